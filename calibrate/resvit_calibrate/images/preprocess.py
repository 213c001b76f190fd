"""From a decoded image to what the network reads, and where in it the image's own pixels lie."""

from __future__ import annotations

from dataclasses import dataclass

from resvit_calibrate.images.targets import Geometry
from resvit_engines.pictures.preprocess import PicturePreprocess


@dataclass(frozen=True)
class Preprocess(PicturePreprocess):
    """What the device does, and how boxes, masks and depths go the same way. Its settings are the device's."""

    def geometry(self, height: int, width: int) -> Geometry:
        """How an image of ``height`` by ``width`` pixels becomes input: for its boxes, masks and depths.

        Raises ``ResvitError`` where ``apply`` would.
        """
        resized_height, resized_width, top, left = self.placed(height, width)
        scale_x, scale_y = resized_width / width, resized_height / height
        return Geometry(scale_x, scale_y, float(left), float(top), height, width, self.size)
