from .spread import KoLeoLoss as KoLeoLoss
from .tokens import DINOLoss as DINOLoss, iBOTPatchLoss as iBOTPatchLoss
