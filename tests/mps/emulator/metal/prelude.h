// Everything a translated kernel stands on. Metal's address spaces become nothing only after this file.
#pragma once
#include "threads.h"

#define __METAL__ 1
#define __METAL_VERSION__ 310
