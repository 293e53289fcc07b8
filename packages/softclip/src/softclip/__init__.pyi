from .loss import SoftClipLoss as SoftClipLoss
from .loss import SoftClipOutput as SoftClipOutput
from .loss import frozen_teacher_soft_clip_loss as frozen_teacher_soft_clip_loss
from .loss import softclip_loss as softclip_loss
