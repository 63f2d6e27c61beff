"""What it looks like when a device's memory does not suffice."""


class DeviceMemoryError(MemoryError):
    """A device's memory did not suffice, and the message says what to do about it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not suffice."""
    import jax  # here, since scripts show their help without it

    # What runs behind the host's back is told as INTERNAL, with the cause in the text.
    told = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and ("resource_exhausted" in told or "out of memory" in told)
