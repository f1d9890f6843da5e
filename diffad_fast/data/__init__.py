"""Where data come from: files, arrays, loaders, data-set layouts; decoded beside the computing."""
