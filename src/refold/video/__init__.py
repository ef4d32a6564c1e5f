"""Videos with a class each: from files to batches of clips, and the models that take them."""

from __future__ import annotations

from refold.video.decoding import open_video
from refold.video.loader import ClipLoader, ViewLoader
from refold.video.models import ClipModel, FrameModel, load_video
from refold.video.motions import MOTIONS, make_motions
from refold.video.sampling import Sampling, Views
from refold.video.sources import find_videos, load_videos
from refold.video.videos import VideoSet, VideoSplits

__all__ = [
    "MOTIONS",
    "ClipLoader",
    "ClipModel",
    "FrameModel",
    "Sampling",
    "VideoSet",
    "VideoSplits",
    "ViewLoader",
    "Views",
    "find_videos",
    "load_video",
    "load_videos",
    "make_motions",
    "open_video",
]
