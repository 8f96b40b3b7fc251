"""Motion of a video, read from the motion vectors of its compressed form.

Contract: `sources` turns a file into frames or clips with motion grids, `grid` turns vectors into macroblock grids
and grids into the model's input, `clips` chooses where clips start, `overlay` draws grids. A grid is float32
[2, rows, columns]: x and y displacement of each 16x16 macroblock since the frame before, as a share of frame width
and height divided by a fixed deviation (`grid.deviation`); positive x is rightward, positive y downward, zero where
a macroblock has no vector. Memory does not grow with the length of the video.
"""
