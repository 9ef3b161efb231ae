"""Support for the tests: tiny models and data, a Hub on the loopback, and the procedure of the paper as a reference."""
