"""Parts of a model that have a kernel behind them: a teacher that is an exponential moving average, its schedules."""

from .ema import ExponentialMovingAverage, ema_update_
from .schedules import cosine_schedule, linear_schedule

__all__ = ["ExponentialMovingAverage", "cosine_schedule", "ema_update_", "linear_schedule"]
