"""What executes annotations in tests: beartype, for which, as in PEP 484, an int is a float too."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
