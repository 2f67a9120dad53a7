"""Our passes inside other people's flows; each module needs the package that it is named after."""
