"""Support for the tests: tiny models and data, a Hub on the loopback, and the published procedure as a reference."""
