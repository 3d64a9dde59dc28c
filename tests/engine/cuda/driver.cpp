// A libcuda.so.1 in software: what cuda-core and engine/cuda/cuda.py need of NVIDIA's driver, and a will to break them.
//
// Device memory is host memory between red zones. Streams are queues that nobody hurries: work runs when something is
// waited for, or at a whim, in a random order that keeps only what streams and events promise, drawn from a seed. So
// work that a wait was forgotten for runs too late, or too early, under some seed. Some seeds are eager (all that can
// run does at once), some lazy (nothing does before it must), most are in between. Kernels are host functions
// NAME_host(grid, block, shared_bytes, args) found in the libraries of STUB_KERNELS; their arguments are copied at the
// launch, by the layout in the cubin. What would be undefined on a GPU (an address or handle that is not alive, a write
// into a red zone) ends the process with a message on stderr.
//
// Beside the driver's functions it has those of the tests, stub_*, at the end. Declared here rather than by cuda.h,
// which is in no wheel that the tests install. Functions have the signatures that cuda-bindings 13 asks for.

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

enum : int {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
    CONTEXT_IS_DESTROYED = 709, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905,
};
// What leaves a context unusable, by NVIDIA's reference.
const std::set<int> STICKY = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999};
const size_t ZONE = 256, MEMORY = size_t(1) << 30;  // of each device, in bytes
const unsigned char ZONE_BYTE = 0xA5, FRESH_BYTE = 0xCD;

[[noreturn]] void die(const char* format, ...) {
    va_list values;
    va_start(values, format);
    fputs("stub driver: ", stderr);
    vfprintf(stderr, format, values);
    fputs("\n", stderr);
    abort();
}

struct Op {
    std::string kind;
    std::function<void()> run;
    std::function<bool()> ready;  // none: at once
};

struct Graph {
    int mode;  // 0: forbids some calls to every thread, 1: to the one that captures, 2: to none
    std::vector<Op> nodes;
    std::thread::id thread = std::this_thread::get_id();
    bool broken = false;  // by a call that a capture forbids
};

struct GraphExec {
    std::vector<Op> nodes;
    unsigned long launched = 0, finished = 0;
};

struct Event {
    int device;
    bool timing;
    unsigned long recorded = 0, reached = 0;
    double microseconds = 0;
};

struct Stream {
    int device;
    std::deque<Op> queue;
    std::unique_ptr<Graph> capture;
};

struct Kernel {
    std::string name;
    void (*host)(const unsigned*, const unsigned*, unsigned, void**);
    std::vector<unsigned> sizes;  // of its arguments
    unsigned shared = 48 << 10;   // dynamic shared memory allowed
};

struct Library {
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

struct Context {
    int device;
    bool active = false;
    int sticky = 0, retained = 0;
    size_t used = 0;
    std::map<uintptr_t, size_t> memory, pinned;
    Stream standard{0, {}, nullptr};  // the default stream
};

std::recursive_mutex mutex;
std::mt19937 random_;
double eagerness = 0.5, clock_ = 0;  // microseconds of the device's work, all told
bool initialised = false;
int devices = 2;
size_t total_memory = MEMORY;
Context contexts[8];
std::set<Stream*> streams;                      // alive, by handle
std::vector<std::shared_ptr<Stream>> draining;  // all that have work, destroyed ones too
std::map<Stream*, std::shared_ptr<Stream>> stream_owners;
std::map<Event*, std::shared_ptr<Event>> events;
std::map<GraphExec*, std::shared_ptr<GraphExec>> execs;
std::set<Graph*> graphs;
std::set<Library*> libraries;
std::map<int, std::string> names;  // of error codes
std::map<std::string, unsigned long> calls;
std::map<std::string, std::pair<unsigned, int>> faults;  // name -> calls until it fails, code
thread_local Context* current = nullptr;

void seed(unsigned value) {
    random_.seed(value);
    eagerness = value % 4 == 0 ? 0.0 : value % 4 == 1 ? 1.0 : std::uniform_real_distribution<>(0.1, 0.9)(random_);
}

__attribute__((constructor)) void start() {
    for (int i = 0; i < 8; i++) contexts[i].device = contexts[i].standard.device = i;
    seed(0);
}

// Counts a call, or a piece of work, and says whether it is to fail.
int fault(const std::string& name) {
    calls[name]++;
    auto found = faults.find(name);
    if (found == faults.end() || --found->second.first > 0) return SUCCESS;
    int code = found->second.second;
    faults.erase(found);
    return code;
}

const std::pair<const uintptr_t, size_t>* block_of(const std::map<uintptr_t, size_t>& blocks, uintptr_t address) {
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return nullptr;
    --after;
    return address < after->first + after->second ? &*after : nullptr;
}

void check_device_range(int device, uintptr_t address, size_t size, const char* what) {
    auto* block = block_of(contexts[device].memory, address);
    if (!block) die("%s: no device memory at 0x%zx on cuda:%d", what, size_t(address), device);
    if (address + size > block->first + block->second)
        die("%s: %zu bytes at 0x%zx end %zu bytes beyond memory of %zu bytes on cuda:%d", what, size, size_t(address),
            size_t(address + size - block->first - block->second), block->second, device);
}

bool is_pinned(uintptr_t address, size_t size) {
    for (auto& context : contexts)
        if (auto* block = block_of(context.pinned, address)) return address + size <= block->first + block->second;
    return false;
}

void check_zones(int device, const char* what) {
    static const std::string zone(ZONE, char(ZONE_BYTE));
    for (auto& [address, size] : contexts[device].memory) {
        auto* base = reinterpret_cast<unsigned char*>(address);
        if (memcmp(base - ZONE, zone.data(), ZONE) || memcmp(base + size, zone.data(), ZONE))
            die("%s wrote outside the memory of %zu bytes at 0x%zx on cuda:%d", what, size, size_t(address), device);
    }
}

// Makes a context unusable; what it had in flight is gone.
void lose(int device, int code) {
    contexts[device].sticky = code;
    for (auto& stream : draining)
        if (stream->device == device) stream->queue.clear();
}

// Runs one piece of work that may run now; false where there is none.
bool step() {
    draining.erase(std::remove_if(draining.begin(), draining.end(), [](auto& s) { return s->queue.empty(); }),
                   draining.end());
    std::vector<std::shared_ptr<Stream>> able;
    for (auto& stream : draining)
        if (auto& op = stream->queue.front(); !op.ready || op.ready()) able.push_back(stream);
    if (able.empty()) return false;
    auto stream = able[std::uniform_int_distribution<size_t>(0, able.size() - 1)(random_)];
    Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    clock_ += 1;
    if (int code = fault(op.kind.substr(0, op.kind.find(' ')))) {
        lose(stream->device, code);
        return true;
    }
    op.run();
    if (op.kind != "event") check_zones(stream->device, op.kind.c_str());
    return true;
}

void whim() {
    while (std::uniform_real_distribution<>(0, 1)(random_) < eagerness && step()) {}
}

int settle(int device, const std::function<bool()>& reached) {
    while (!contexts[device].sticky && !reached())
        if (!step()) die("deadlock: nothing can run, and what is waited for is not done");
    return contexts[device].sticky;
}

int put(Stream* stream, std::string kind, std::function<void()> run, std::function<bool()> ready = {}) {
    if (stream->capture) {
        if (ready) return CAPTURE_ISOLATION;
        stream->capture->nodes.push_back({kind, run, {}});
        return SUCCESS;
    }
    stream->queue.push_back({kind, run, ready});
    auto owner = stream_owners.at(stream);
    if (std::find(draining.begin(), draining.end(), owner) == draining.end()) draining.push_back(owner);
    whim();
    return SUCCESS;
}

Stream* stream_at(Stream* handle, const char* name) {
    if (reinterpret_cast<uintptr_t>(handle) <= 2) {
        auto* standard = &current->standard;
        stream_owners.emplace(standard, std::shared_ptr<Stream>(standard, [](Stream*) {}));
        return standard;
    }
    if (!streams.count(handle)) die("%s: stream %p is not alive", name, static_cast<void*>(handle));
    return handle;
}

std::shared_ptr<Event> event_at(Event* handle, const char* name) {
    if (!events.count(handle)) die("%s: event %p is not alive", name, static_cast<void*>(handle));
    return events.at(handle);
}

// A call that captures forbid.
int forbidden_in_capture() {
    bool found = false;
    for (auto* stream : streams)
        if (Graph* graph = stream->capture.get())
            if (graph->mode == 0 || (graph->mode == 1 && graph->thread == std::this_thread::get_id()))
                found = graph->broken = true;
    return found ? CAPTURE_UNSUPPORTED : SUCCESS;
}

int in_context() {
    if (!initialised) return NOT_INITIALIZED;
    if (!current) return INVALID_CONTEXT;
    if (!current->active) return CONTEXT_IS_DESTROYED;
    return current->sticky;
}

// The layout of each kernel's arguments, from the ".nv.info.NAME" sections of a cubin.
bool read_cubin(const unsigned char* image, Library& library) {
    if (memcmp(image, "\x7f" "ELF", 4)) return false;
    auto at = [&](size_t offset, auto zero) { memcpy(&zero, image + offset, sizeof zero); return zero; };
    size_t table = at(0x28, uint64_t());
    size_t count = at(0x3c, uint16_t()), strings = at(table + 64 * at(0x3e, uint16_t()) + 24, uint64_t());
    for (size_t i = 0; i < count; i++) {
        size_t section = table + 64 * i;
        std::string name = reinterpret_cast<const char*>(image + strings + at(section, uint32_t()));
        if (name.rfind(".nv.info.", 0)) continue;
        auto kernel = std::make_unique<Kernel>();
        kernel->name = name.substr(9);
        size_t p = at(section + 24, uint64_t()), end = p + at(section + 32, uint64_t());
        while (p < end) {
            int format = image[p], attribute = image[p + 1];
            size_t size = format == 4 ? at(p + 2, uint16_t()) : 0;
            if (format == 4 && attribute == 0x17) {  // EIATTR_KPARAM_INFO: index, ordinal, offset, size above bit 18
                size_t ordinal = at(p + 8, uint16_t());
                kernel->sizes.resize(std::max(kernel->sizes.size(), ordinal + 1));
                kernel->sizes[ordinal] = at(p + 12, uint32_t()) >> 18;
            }
            p += 4 + size;
        }
        library.kernels[kernel->name] = std::move(kernel);
    }
    return true;
}

void* host_function(const std::string& name) {
    std::stringstream paths(getenv("STUB_KERNELS") ? getenv("STUB_KERNELS") : "");
    for (std::string path; std::getline(paths, path, ':');) {
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!library) die("cannot load STUB_KERNELS: %s", dlerror());
        if (void* found = dlsym(library, (name + "_host").c_str())) return found;
    }
    die("no library of STUB_KERNELS has %s_host", name.c_str());
}

int copy(Stream* stream, uintptr_t to, uintptr_t from, size_t size, bool to_device) {
    uintptr_t host = to_device ? from : to, address = to_device ? to : from;
    bool locked = is_pinned(host, size);
    if (!locked) calls["pageable"]++;
    int device = stream->device;
    return put(stream, "copy", [=] {
        check_device_range(device, address, size, to_device ? "copy to the device" : "copy to the host");
        if (locked && !is_pinned(host, size)) die("page-locked memory was freed before a copy of it was done");
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
        clock_ += size / 1e4;
    });
}

int launch(Kernel* kernel, const unsigned* shape, unsigned shared, Stream* stream, void** args) {
    uint64_t threads = uint64_t(shape[3]) * shape[4] * shape[5];
    for (int i = 0; i < 6; i++)
        if (!shape[i]) return INVALID_VALUE;
    if (threads > 1024 || shared > kernel->shared) return INVALID_VALUE;
    std::vector<unsigned> grid(shape, shape + 3), block(shape + 3, shape + 6);
    std::vector<std::string> values;
    for (size_t i = 0; i < kernel->sizes.size(); i++)
        values.emplace_back(static_cast<const char*>(args[i]), kernel->sizes[i]);
    return put(stream, "kernel " + kernel->name, [=]() mutable {
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(value.data());
        kernel->host(grid.data(), block.data(), shared, pointers.data());
        clock_ += double(grid[0]) * grid[1] * grid[2];
    });
}

}  // namespace

#define LOCK(name)                                        \
    std::lock_guard<std::recursive_mutex> lock(mutex);    \
    if (int code = fault(name)) {                         \
        if (STICKY.count(code) && current) lose(current->device, code); \
        return code;                                      \
    }
#define ENTER(name) \
    LOCK(name)      \
    if (!initialised) return NOT_INITIALIZED;
#define IN_CONTEXT(name) \
    LOCK(name)           \
    if (int code = in_context()) return code;
#define ON_STREAM(name)                       \
    IN_CONTEXT(name)                          \
    auto* stream = stream_at(handle, name);   \
    if (stream->device != current->device) return INVALID_HANDLE;

#pragma GCC visibility push(default)
extern "C" {

int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    static void* self = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&cuGetProcAddress_v2), &info);
        return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
    *function = dlsym(self, name);
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

// NVRTC asks for private tables, and takes a no.
int cuGetExportTable(const void** table, const void*) { return *table = nullptr, NOT_FOUND; }

// The driver and its devices.

int cuInit(unsigned) {
    LOCK("cuInit")
    initialised = true;
    return SUCCESS;
}
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuGetErrorName(int code, const char** text) { return *text = names[code].c_str(), SUCCESS; }
int cuGetErrorString(int, const char** text) { return *text = "see the code", SUCCESS; }
int cuDeviceGetCount(int* count) {
    ENTER("cuDeviceGetCount")
    return *count = devices, SUCCESS;
}
int cuDeviceGet(int* device, int index) {
    ENTER("cuDeviceGet")
    if (index < 0 || index >= devices) return INVALID_DEVICE;
    return *device = index, SUCCESS;
}
int cuDeviceGetName(char* name, int size, int device) {
    ENTER("cuDeviceGetName")
    return snprintf(name, size, "Software GPU %d", device), SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER("cuDeviceGetAttribute")
    const std::map<int, int> known = {{1, 1024}, {10, 32}, {75, 9}, {76, 0}, {97, 227 << 10}};
    auto found = known.find(attribute);
    return *value = found == known.end() ? 0 : found->second, SUCCESS;
}

// Contexts.

int cuDevicePrimaryCtxRetain(Context** context, int device) {
    ENTER("cuDevicePrimaryCtxRetain")
    if (contexts[device].sticky) return contexts[device].sticky;
    contexts[device].retained++;
    contexts[device].active = true;
    return *context = &contexts[device], SUCCESS;
}
int cuDevicePrimaryCtxRelease(int device) {
    ENTER("cuDevicePrimaryCtxRelease")
    if (contexts[device].retained-- <= 0) die("a primary context is released more often than retained");
    return SUCCESS;
}
int cuDevicePrimaryCtxReset(int device) {
    ENTER("cuDevicePrimaryCtxReset")
    Context& context = contexts[device];
    lose(device, SUCCESS);
    for (auto& [address, size] : context.memory) free(reinterpret_cast<void*>(address - ZONE));
    for (auto& [address, size] : context.pinned) free(reinterpret_cast<void*>(address));
    context.memory.clear();
    context.pinned.clear();
    context.used = 0;
    context.active = false;
    for (auto it = stream_owners.begin(); it != stream_owners.end();) {
        if (it->first->device != device) { ++it; continue; }
        streams.erase(it->first);
        it = stream_owners.erase(it);
    }
    for (auto it = events.begin(); it != events.end();) it = it->first->device == device ? events.erase(it) : std::next(it);
    return SUCCESS;
}
int cuCtxSetCurrent(Context* context) {
    ENTER("cuCtxSetCurrent")
    current = context;
    return context && !context->active ? CONTEXT_IS_DESTROYED : SUCCESS;
}
int cuCtxGetDevice(int* device) {
    IN_CONTEXT("cuCtxGetDevice")
    return *device = current->device, SUCCESS;
}
int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    IN_CONTEXT("cuCtxGetStreamPriorityRange")
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

// Memory.

int cuMemGetInfo(size_t* available, size_t* total) {
    IN_CONTEXT("cuMemGetInfo")
    *total = total_memory;
    return *available = total_memory - current->used, SUCCESS;
}
int cuMemAlloc(uintptr_t* address, size_t size) {
    IN_CONTEXT("cuMemAlloc")
    if (int code = forbidden_in_capture()) return code;
    if (!size) return INVALID_VALUE;
    Context& context = *current;
    if (size > total_memory - context.used) return OUT_OF_MEMORY;
    auto* base = static_cast<unsigned char*>(aligned_alloc(256, (size + 2 * ZONE + 255) / 256 * 256));
    memset(base, ZONE_BYTE, size + 2 * ZONE);
    memset(base + ZONE, FRESH_BYTE, size);
    *address = reinterpret_cast<uintptr_t>(base + ZONE);
    context.memory[*address] = size;
    context.used += size;
    return SUCCESS;
}
int cuMemFree(uintptr_t address) {
    IN_CONTEXT("cuMemFree")
    if (int code = forbidden_in_capture()) return code;
    Context& context = *current;
    if (!context.memory.count(address)) die("cuMemFree: no device memory starts at 0x%zx", size_t(address));
    check_zones(context.device, "something");
    context.used -= context.memory[address];
    context.memory.erase(address);
    free(reinterpret_cast<void*>(address - ZONE));
    return SUCCESS;
}
int cuMemAllocHost(void** address, size_t size) {
    IN_CONTEXT("cuMemAllocHost")
    if (int code = forbidden_in_capture()) return code;
    if (!size) return INVALID_VALUE;
    if (size > total_memory) return OUT_OF_MEMORY;
    *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    memset(*address, FRESH_BYTE, size);
    current->pinned[reinterpret_cast<uintptr_t>(*address)] = size;
    return SUCCESS;
}
int cuMemFreeHost(void* address) {
    IN_CONTEXT("cuMemFreeHost")
    if (!current->pinned.erase(reinterpret_cast<uintptr_t>(address))) die("cuMemFreeHost: no memory starts at %p", address);
    free(address);
    return SUCCESS;
}
int cuMemcpyHtoD(uintptr_t to, const void* from, size_t size) {
    IN_CONTEXT("cuMemcpyHtoD")
    check_device_range(current->device, to, size, "cuMemcpyHtoD");
    memcpy(reinterpret_cast<void*>(to), from, size);
    return SUCCESS;
}
int cuMemcpyDtoH(void* to, uintptr_t from, size_t size) {
    IN_CONTEXT("cuMemcpyDtoH")
    check_device_range(current->device, from, size, "cuMemcpyDtoH");
    memcpy(to, reinterpret_cast<void*>(from), size);
    return SUCCESS;
}
int cuMemcpyHtoDAsync(uintptr_t to, const void* from, size_t size, Stream* handle) {
    ON_STREAM("cuMemcpyHtoDAsync")
    return copy(stream, to, reinterpret_cast<uintptr_t>(from), size, true);
}
int cuMemcpyDtoHAsync(void* to, uintptr_t from, size_t size, Stream* handle) {
    ON_STREAM("cuMemcpyDtoHAsync")
    return copy(stream, reinterpret_cast<uintptr_t>(to), from, size, false);
}
int cuMemsetD8Async(uintptr_t address, unsigned char value, size_t size, Stream* handle) {
    ON_STREAM("cuMemsetD8Async")
    int device = stream->device;
    return put(stream, "fill", [=] {
        check_device_range(device, address, size, "fill");
        memset(reinterpret_cast<void*>(address), value, size);
    });
}
int cuPointerGetAttribute(void* data, int attribute, uintptr_t address) {
    ENTER("cuPointerGetAttribute")
    for (auto& context : contexts) {
        if (!block_of(context.memory, address)) continue;
        switch (attribute) {
            case 1: return *static_cast<Context**>(data) = &context, SUCCESS;
            case 2: return *static_cast<unsigned*>(data) = 2, SUCCESS;  // CU_MEMORYTYPE_DEVICE
            case 3: return *static_cast<uintptr_t*>(data) = address, SUCCESS;
            case 8: return *static_cast<bool*>(data) = false, SUCCESS;
            case 9: return *static_cast<int*>(data) = context.device, SUCCESS;
        }
    }
    return INVALID_VALUE;
}
int cuPointerGetAttributes(unsigned count, int* attributes, void** data, uintptr_t address) {
    ENTER("cuPointerGetAttributes")
    for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(data[i], attributes[i], address);
    return SUCCESS;
}

// Streams and events.

int cuStreamCreateWithPriority(Stream** handle, unsigned, int) {
    IN_CONTEXT("cuStreamCreateWithPriority")
    auto stream = std::make_shared<Stream>(Stream{current->device, {}, nullptr});
    streams.insert(stream.get());
    stream_owners[stream.get()] = stream;
    return *handle = stream.get(), SUCCESS;
}
int cuStreamDestroy(Stream* handle) {
    ENTER("cuStreamDestroy")
    stream_at(handle, "cuStreamDestroy");
    streams.erase(handle);
    stream_owners.erase(handle);
    return SUCCESS;
}
int cuStreamSynchronize(Stream* handle) {
    IN_CONTEXT("cuStreamSynchronize")
    auto* stream = stream_at(handle, "cuStreamSynchronize");
    if (stream->capture) return stream->capture->broken = true, CAPTURE_UNSUPPORTED;
    return settle(stream->device, [=] { return stream->queue.empty(); });
}
int cuStreamWaitEvent(Stream* handle, Event* event_handle, unsigned) {
    ON_STREAM("cuStreamWaitEvent")
    auto event = event_at(event_handle, "cuStreamWaitEvent");
    unsigned long awaited = event->recorded;
    if (stream->capture) return stream->capture->broken = true, CAPTURE_ISOLATION;
    return put(stream, "event", [] {}, [=] { return event->reached >= awaited; });
}
int cuEventCreate(Event** handle, unsigned flags) {
    IN_CONTEXT("cuEventCreate")
    auto event = std::make_shared<Event>(Event{current->device, !(flags & 2)});
    events[event.get()] = event;
    return *handle = event.get(), SUCCESS;
}
int cuEventDestroy(Event* handle) {
    ENTER("cuEventDestroy")
    event_at(handle, "cuEventDestroy");
    return events.erase(handle), SUCCESS;
}
int cuEventRecord(Event* event_handle, Stream* handle) {
    ON_STREAM("cuEventRecord")
    auto event = event_at(event_handle, "cuEventRecord");
    if (event->device != stream->device) return INVALID_HANDLE;
    if (stream->capture) return stream->capture->broken = true, CAPTURE_UNSUPPORTED;  // forks are not modelled
    unsigned long reached = ++event->recorded;
    return put(stream, "event", [=] {
        event->reached = std::max(event->reached, reached);
        event->microseconds = clock_;
    });
}
int cuEventQuery(Event* handle) {
    IN_CONTEXT("cuEventQuery")
    auto event = event_at(handle, "cuEventQuery");
    if (event->reached < event->recorded && random_() % 2) step();  // who asks often enough is answered
    if (int code = contexts[event->device].sticky) return code;
    return event->reached < event->recorded ? NOT_READY : SUCCESS;
}
int cuEventSynchronize(Event* handle) {
    IN_CONTEXT("cuEventSynchronize")
    auto event = event_at(handle, "cuEventSynchronize");
    return settle(event->device, [=] { return event->reached >= event->recorded; });
}
int cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    IN_CONTEXT("cuEventElapsedTime")
    auto a = event_at(start, "cuEventElapsedTime"), b = event_at(end, "cuEventElapsedTime");
    if (!a->timing || !b->timing || !a->recorded || !b->recorded) return INVALID_HANDLE;
    if (a->reached < a->recorded || b->reached < b->recorded) return NOT_READY;
    return *milliseconds = float((b->microseconds - a->microseconds) / 1000), SUCCESS;
}

// Graphs.

int cuStreamBeginCapture(Stream* handle, int mode) {
    ON_STREAM("cuStreamBeginCapture")
    return stream->capture.reset(new Graph{mode, {}}), SUCCESS;
}
int cuStreamEndCapture(Stream* handle, Graph** graph) {
    ON_STREAM("cuStreamEndCapture")
    auto capture = std::move(stream->capture);
    *graph = nullptr;
    if (!capture || capture->broken) return CAPTURE_INVALIDATED;
    graphs.insert(*graph = capture.release());
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(GraphExec** handle, Graph* graph, uint64_t) {
    IN_CONTEXT("cuGraphInstantiateWithFlags")
    if (!graphs.count(graph)) die("cuGraphInstantiateWithFlags: the graph is not alive");
    auto exec = std::make_shared<GraphExec>();
    exec->nodes = graph->nodes;
    execs[exec.get()] = exec;
    return *handle = exec.get(), SUCCESS;
}
int cuGraphDestroy(Graph* graph) {
    ENTER("cuGraphDestroy")
    if (!graphs.erase(graph)) die("cuGraphDestroy: the graph is not alive");
    delete graph;
    return SUCCESS;
}
int cuGraphExecDestroy(GraphExec* handle) {
    ENTER("cuGraphExecDestroy")
    if (!execs.erase(handle)) die("cuGraphExecDestroy: the graph is not alive");
    return SUCCESS;
}
int cuGraphLaunch(GraphExec* graph, Stream* handle) {
    ON_STREAM("cuGraphLaunch")
    if (!execs.count(graph)) die("cuGraphLaunch: the graph is not alive");
    auto exec = execs[graph];
    unsigned long turn = exec->launched++;
    put(stream, "event", [] {}, [=] { return exec->finished == turn; });  // launches of one graph take turns
    for (auto& node : exec->nodes) put(stream, node.kind, node.run);
    return put(stream, "event", [=] { exec->finished++; });
}

// Kernels.

int cuLibraryLoadData(Library** handle, const void* image, void*, void*, unsigned, void*, void*, unsigned) {
    ENTER("cuLibraryLoadData")
    auto library = std::make_unique<Library>();
    if (!read_cubin(static_cast<const unsigned char*>(image), *library)) return INVALID_IMAGE;
    libraries.insert(*handle = library.release());
    return SUCCESS;
}
int cuLibraryGetKernel(Kernel** kernel, Library* library, const char* name) {
    ENTER("cuLibraryGetKernel")
    if (!libraries.count(library)) die("cuLibraryGetKernel: the library is not loaded");
    auto found = library->kernels.find(name);
    if (found == library->kernels.end()) return NOT_FOUND;
    *kernel = found->second.get();
    (*kernel)->host = reinterpret_cast<decltype(Kernel::host)>(host_function(name));
    return SUCCESS;
}
int cuKernelGetAttribute(int* value, int attribute, Kernel*, int) {
    ENTER("cuKernelGetAttribute")
    return *value = 0, attribute == 1 ? SUCCESS : INVALID_VALUE;  // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: no static ones
}
int cuKernelSetAttribute(int attribute, int value, Kernel* kernel, int) {
    ENTER("cuKernelSetAttribute")
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return kernel->shared = value, SUCCESS;
}
struct LaunchConfig {
    unsigned shape[6], shared;
    Stream* stream;
};
int cuLaunchKernelEx(const LaunchConfig* config, Kernel* kernel, void** args, void**) {
    auto* handle = config->stream;
    ON_STREAM("cuLaunchKernelEx")
    return launch(kernel, config->shape, config->shared, stream, args);
}
int cuLaunchHostFunc(Stream* handle, void (*function)(void*), void* data) {
    ON_STREAM("cuLaunchHostFunc")
    return put(stream, "host", [=] { function(data); });
}

// For the tests.

// As at the start.
void stub_reset() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    faults.clear();
    total_memory = MEMORY;
    devices = 2;
    seed(0);
}
// Which order work runs in from now on.
void stub_seed(unsigned value) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    seed(value);
}
// The nth call from now of that function fails with this code; or the nth "kernel", "copy" or "fill" when it runs,
// which the next to wait hears of. A sticky code leaves the context unusable until it is reset.
void stub_fail(const char* name, unsigned nth, int code) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    faults[name] = {nth, code};
}
// What an error code is called.
void stub_name(int code, const char* name) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    names[code] = name;
}
// How many devices there are, up to 8.
void stub_devices(int count) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    devices = count;
}
// How much memory each device has, in bytes.
void stub_memory(size_t size) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    total_memory = size;
}
// What is alive ("bytes" and "blocks" of device memory, "pinned", "streams", "events", "graphs"), else how
// often a function was called, a kind of work ran ("kernel", "copy", "fill"), or a copy used "pageable" memory.
unsigned long stub_count(const char* name) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    size_t bytes = 0, blocks = 0, pinned = 0;
    for (auto& context : contexts)
        bytes += context.used, blocks += context.memory.size(), pinned += context.pinned.size();
    const std::map<std::string, size_t> alive = {
        {"bytes", bytes}, {"blocks", blocks}, {"pinned", pinned}, {"streams", streams.size()},
        {"events", events.size()}, {"graphs", graphs.size() + execs.size()}};
    auto found = alive.find(name);
    return found != alive.end() ? found->second : calls[name];
}

}  // extern "C"
#pragma GCC visibility pop
