/* The part of CUDA's driver API that the plugin library calls, declared after its documentation: for machines without
   CUDA, and for tests alone. */
#pragma once

typedef int CUresult;
enum { CUDA_SUCCESS = 0 };
typedef enum { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 } CUfunction_attribute;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

extern "C" {
CUresult cuGetErrorString(CUresult error, char const **text);
CUresult cuCtxGetCurrent(CUcontext *context);
CUresult cuCtxPushCurrent(CUcontext context);
CUresult cuCtxPopCurrent(CUcontext *context);
CUresult cuModuleLoadData(CUmodule *module, void const *image);
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, char const *name);
CUresult cuModuleUnload(CUmodule module);
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value);
CUresult cuLaunchKernel(CUfunction function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
    unsigned blockY, unsigned blockZ, unsigned shared, CUstream stream, void **arguments, void **extra);
}
