"""Which installed versions lie outside the ranges that the project was tested with; these stand in pyproject.toml alone."""

import importlib.metadata

TESTED = None  # the copy in an exported folder holds the ranges of what that needs


def outside(needed):
    """Of requirements such as "numpy>=2.0,<3", a sentence on each whose installed version is another one: list of str."""
    from packaging.requirements import Requirement

    found = []
    for requirement in map(Requirement, needed):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(
                f"{requirement.name} is {version}, newllm wants {requirement.name}{requirement.specifier}"
            )
    return found
