"""Every law of encoders on every method for them, and on a twin that breaks just that law and must be caught."""

import pytest

from fewer.methods import of_family
from tests.laws.encoder_battery import LAWS
from tests.laws.scene import fitted


@pytest.mark.parametrize("name", [name for name in of_family("vit") if name != "full"])
@pytest.mark.parametrize("law", LAWS)
def test_methods_obey(law: str, name: str) -> None:
    LAWS[law](fitted(name))
