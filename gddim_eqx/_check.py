def check_count(name: str, value: int) -> None:
    """**Raises:** `ValueError` unless the value is a positive integer."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
