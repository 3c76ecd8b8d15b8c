"""A model without a network, for tests of what lies around one."""

import numpy as np

from models.fusion.prediction import as_picture, decide


class RedModel:
    """The map is the red channel in [0, 1], the score its maximum; an alarm from 0.9 on."""

    name, device, batch_size, bit_depth = "red", "cpu", 4, 16
    threshold, pixel_threshold, min_area, operating_point, roi = 0.9, 0.5, 0, None, None

    def __call__(self, images, batch_size=None):
        return [self.look(as_picture(image)) for image in images]

    def look(self, picture):
        red = np.asarray(picture.image)[..., 0].astype(np.float32) / 255
        return decide(self, float(red.max()), red, picture.size, {})
