#include "memory.h"

#include <malloc.h>

namespace {

void *get(size_t size) {
    if (memory::watching && memory::left >= 0 && memory::left-- == 0) return nullptr;
    void *block = malloc(size ? size : 1);
    if (!block || !memory::watching) return block;
    int64_t now = memory::held += int64_t(malloc_usable_size(block));
    for (int64_t before = memory::most; now > before && !memory::most.compare_exchange_weak(before, now);) {
    }
    return block;
}

void give_back(void *block) {
    if (memory::watching) memory::held -= int64_t(malloc_usable_size(block));
    free(block);
}

}  // namespace

void *operator new(size_t size) {
    if (void *block = get(size)) return block;
    throw std::bad_alloc();
}
void *operator new[](size_t size) { return operator new(size); }
void *operator new(size_t size, const std::nothrow_t &) noexcept { return get(size); }
void operator delete(void *block) noexcept { give_back(block); }
void operator delete[](void *block) noexcept { give_back(block); }
void operator delete(void *block, size_t) noexcept { give_back(block); }
void operator delete[](void *block, size_t) noexcept { give_back(block); }
