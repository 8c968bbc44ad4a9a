"""What untrained mechanisms keep of the pairs that they have read: the cases of `attnlab regress`."""

from types import ModuleType

from attnlab.regress import capacity, outliers, regression

# By name: write(folder, seeds=, command=) writes folder/NAME.md and NAME.png, and gives the table.
CASES: dict[str, ModuleType] = {"regression": regression, "capacity": capacity, "outliers": outliers}
