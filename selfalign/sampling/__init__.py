"""From noise to images: solvers, guidance, and numbered sets of samples."""
