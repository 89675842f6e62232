// Memory that starts on a cache line, is zero at first, and has room to read past its end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace lowbit {

class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes) : size_(bytes) {
        const size_t room = (bytes + 512 + 63) / 64 * 64;  // kSlack of layer.h, whole lines
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, room) != 0) throw std::bad_alloc();
        std::memset(memory, 0, room);
        data_.reset(static_cast<uint8_t*>(memory));
    }

    template <typename T> T* as() { return reinterpret_cast<T*>(data_.get()); }
    template <typename T> const T* as() const { return reinterpret_cast<const T*>(data_.get()); }
    size_t size() const { return size_; }

private:
    struct Free {
        void operator()(uint8_t* memory) const { std::free(memory); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    size_t size_ = 0;
};

}  // namespace lowbit
