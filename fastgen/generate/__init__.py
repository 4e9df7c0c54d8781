"""Requests -> pictures: job > run > pipeline > conditions and decoder."""
