/* A driver that launches nothing: it says on standard output what it is asked. FAIL names a function that fails. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int asked(const char *name, const char *more)
{
    const char *fails = getenv("FAIL");
    int failed = fails != NULL && strcmp(fails, name) == 0;
    printf("cuda %s%s\n", name, more);
    fflush(stdout);
    return failed ? 2 : 0;
}

int cuGetErrorString(int code, const char **text) { *text = code == 2 ? "out of memory" : NULL; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)0x11; return asked("cuCtxGetCurrent", ""); }
int cuCtxPushCurrent_v2(void *context) { (void)context; return asked("cuCtxPushCurrent", ""); }
int cuCtxPopCurrent_v2(void **context) { *context = 0; return asked("cuCtxPopCurrent", ""); }
int cuModuleUnload(void *module) { (void)module; return asked("cuModuleUnload", ""); }

int cuModuleLoadData(void **module, const char *image)
{
    char more[64];
    snprintf(more, sizeof more, " %zu", strlen(image));
    *module = (void *)0x22;
    return asked("cuModuleLoadData", more);
}

int cuModuleGetFunction(void **function, void *module, const char *name)
{
    char more[256];
    (void)module;
    snprintf(more, sizeof more, " %s", name);
    *function = (void *)0x33;
    return asked("cuModuleGetFunction", more);
}

int cuFuncSetAttribute(void *function, int attribute, int value)
{
    char more[64];
    (void)function;
    snprintf(more, sizeof more, " %d %d", attribute, value);
    return asked("cuFuncSetAttribute", more);
}

/* ARGUMENTS says how each argument is to be read: p for a pointer, i for an int32. */
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra)
{
    char more[1024];
    const char *kinds = getenv("ARGUMENTS");
    int at = snprintf(more, sizeof more, " %u,%u,%u %u,%u,%u %u %#lx", gx, gy, gz, bx, by, bz, shared,
                      (unsigned long)(uintptr_t)stream);
    (void)function;
    (void)extra;
    for (int i = 0; kinds != NULL && kinds[i] != 0; ++i) {
        if (kinds[i] == 'p')
            at += snprintf(more + at, sizeof more - at, " %#lx", (unsigned long)*(uintptr_t *)arguments[i]);
        else
            at += snprintf(more + at, sizeof more - at, " %d", *(int32_t *)arguments[i]);
    }
    return asked("cuLaunchKernel", more);
}
