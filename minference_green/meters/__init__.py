"""Energy meters: a counter, a sampler, a model, and a simulated device with known truth."""
