"""Which implementation serves a call, and how a kernel becomes a function of JAX's: traced late, differentiable, spread
over devices."""
