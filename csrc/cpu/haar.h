// The loop over an image's Haar blocks, which dwt2d and idwt2d share with the packets.
#pragma once

#include "kernels/haar.h"

namespace diffad {

// Runs the kernel over all planes of `batch` images. `args` is complete but for its tile.
void haar_tiles(HaarArgs& args, int64_t batch);

}  // namespace diffad
