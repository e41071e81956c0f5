"""Files of tokens, as an operator writes them."""

from __future__ import annotations


def entry(tenant: str = "a", roles: str = '["generate"]', **more: str) -> str:
    return f'[[token]]\ntenant = "{tenant}"\nroles = {roles}\n' + "".join(
        f'{key} = "{value}"\n' for key, value in more.items()
    )
