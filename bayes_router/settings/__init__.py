"""The sections of the settings, each frozen and checked when made; `config` joins them."""
