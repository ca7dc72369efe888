/* All kernels of one instruction set. The build compiles this file once for each set, with its flags, SET as its name and VECTORS_OF
   as the header of its vectors. The exported names end with the name of the set. */

#include <stdlib.h>

/* The order matters: each file uses the files before it. */
#include "numbers.h"
#include VECTORS_OF
#include "vectors.h"
#include "passed.h"
#include "team.h"
#include "linear.h"
#include "job.h"
#include "attention.h"

#define JOINED(name, set) foredraft_##name##_##set
#define NAMED(name, set) JOINED(name, set)
#define EXPORT(name) __attribute__((visibility("default"))) NAMED(name, SET)

#include "decoder.h"
#include "layers.h"
#include "peak.h"
#include "laws.h"
#include "chains.h"
#include "draws.h"
#include "acceptance.h"
