"""Modules and updates with a kernel behind them."""
