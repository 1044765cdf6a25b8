"""tmp"""
from dataclasses import dataclass, field
@dataclass
class Bound:
    seconds: float = 0.0
    solver: str = "none"
    provenance: dict = field(default_factory=dict)
def bound_and_choice(search, deadline):
    return Bound()
