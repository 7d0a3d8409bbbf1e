"""The mathematics of multi-modal diffusion in pure torch: schedules, weights, process, loss, samplers."""
