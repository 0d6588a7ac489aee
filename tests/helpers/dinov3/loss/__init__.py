from .gram import GramLoss as GramLoss
from .spread import KoLeoLoss as KoLeoLoss, KoLeoLossDistributed as KoLeoLossDistributed
from .tokens import DINOLoss as DINOLoss, iBOTPatchLoss as iBOTPatchLoss
