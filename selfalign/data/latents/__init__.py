"""Data sets prepared once and read fast: latents (or pixels) of every image in a few large files.

`sources` finds the images, `autoencoder` encodes them, `layout` says what the set will hold, `prepare`
and its `workers` write it, `store` is the format on disk, `verify` checks it, and `reader` is the
`DataSource` that training opens.
"""
