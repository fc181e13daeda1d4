"""The battery that tries to catch the engine, the policies and the replay at a wrong law; see docs/exactness.md."""
