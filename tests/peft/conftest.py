"""What two files of tests share: models on disk that both libraries start from."""

import pytest

from tests.peft.library import make_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family, tied):
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp("base")
            made[family, tied] = make_base(folder, family, tied)
        return made[family, tied]

    return base
