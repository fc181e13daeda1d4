"""From a `Trace` to numbers and figures, whichever clock wrote it. Metrics never draw, figures never compute."""
