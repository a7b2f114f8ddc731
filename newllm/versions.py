"""Which installed versions lie outside the ranges that the project was tested with."""

import importlib.metadata

TESTED = None  # the copy in an exported folder holds the ranges of what that needs


def outside(needed):
    """A sentence on each requirement, such as "numpy>=2.0,<3", that the installed version does not meet."""
    from packaging.requirements import Requirement

    sentences = []
    for requirement in map(Requirement, needed):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            sentences.append(f"{requirement.name} is {version}, newllm wants {wanted}")
    return sentences
