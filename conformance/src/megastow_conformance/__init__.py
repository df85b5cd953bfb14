"""The conformance suite that every megastow adapter must pass, as a pytest plugin."""
