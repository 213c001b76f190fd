// A stand-in for CUDA's runtime, for tests without a GPU: device memory is host memory, a stream does its work on a thread
// of its own, captures record it. RESVIT_TEST_FAIL="cudaMalloc 2 2" makes the second such call fail with error 2;
// RESVIT_TEST_SM is the GPU's. Streams that run beside the caller show what is read before it was waited for.
#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

using Work = std::function<void()>;

struct CUgraph_st {
    std::vector<Work> work;
};
struct CUgraphExec_st {
    std::vector<Work> work;
};

struct CUstream_st {
    CUstream_st() : thread{[this] { run(); }} {}
    ~CUstream_st() {
        put(nullptr);
        thread.join();
    }
    void put(Work work) {
        {
            std::lock_guard<std::mutex> const alone{mutex};
            waiting.push_back(std::move(work));
        }
        changed.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> alone{mutex};
        changed.wait(alone, [this] { return waiting.empty() && !busy; });
    }
    void run() {
        for (;;) {
            std::unique_lock<std::mutex> alone{mutex};
            changed.wait(alone, [this] { return !waiting.empty(); });
            Work const work = std::move(waiting.front());
            waiting.pop_front();
            if (!work) { return; }
            busy = true;
            alone.unlock();
            work();
            alone.lock();
            busy = false;
            changed.notify_all();
        }
    }

    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Work> waiting;
    bool busy = false;
    bool recording = false;
    std::vector<Work> recorded;
    std::thread thread;
};

namespace {

cudaError_t told(char const* name) {
    static std::mutex mutex;
    static std::map<std::string, int> calls;
    char const* const fail = std::getenv("RESVIT_TEST_FAIL");
    if (fail == nullptr) { return cudaSuccess; }
    std::istringstream words{fail};
    std::string call;
    int number = 0, code = 0;
    words >> call >> number >> code;
    std::lock_guard<std::mutex> const alone{mutex};
    return call == name && ++calls[name] == number ? static_cast<cudaError_t>(code) : cudaSuccess;
}

} // namespace

#define OR_FAIL                                                                                                        \
    if (auto const code = told(__func__); code != cudaSuccess) { return code; }

extern "C" {
// What the stand-in for TensorRT launches.
void standinLaunch(cudaStream_t stream, std::function<void()> work) {
    if (stream->recording) {
        stream->recorded.push_back(std::move(work));
    } else {
        stream->put(std::move(work));
    }
}

char const* cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "said"; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
    OR_FAIL *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorNoDevice; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    OR_FAIL
    char const* const sm = std::getenv("RESVIT_TEST_SM");
    int const number = sm == nullptr ? 87 : std::atoi(sm);
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? number / 10 : number % 10;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** address, size_t size) {
    OR_FAIL *address = std::malloc(size);
    return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
    std::free(address);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
    OR_FAIL *address = std::malloc(size);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* address) {
    std::free(address);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    OR_FAIL
    if (stream->recording) { return cudaErrorStreamCaptureInvalidated; }
    stream->put([=] { std::memcpy(to, from, size); });
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    OR_FAIL *stream = new CUstream_st;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    stream->wait();
    OR_FAIL
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    OR_FAIL
    stream->recorded.clear();
    stream->recording = true;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    stream->recording = false;
    OR_FAIL *graph = new CUgraph_st{stream->recorded};
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    OR_FAIL *executable = new CUgraphExec_st{graph->work};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    OR_FAIL for (auto const& work : executable->work) { stream->put(work); }
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}
}
