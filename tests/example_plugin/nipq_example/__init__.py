"""A quantizer, a cost, a task, a strategy and a sampler for nipq_search."""
