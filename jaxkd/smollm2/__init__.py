"""SmolLM2, and any Llama of the same parts, as a policy: real weights in, real weights out."""
