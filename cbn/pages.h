/* Pages from the system, in huge pages where it has them, and the lock of the list of free ones. */
#include <pthread.h>
#include <stddef.h>
#include <sys/mman.h>

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

static pthread_mutex_t pages_lock = PTHREAD_MUTEX_INITIALIZER;

static void lock(void) { pthread_mutex_lock(&pages_lock); }
static void unlock(void) { pthread_mutex_unlock(&pages_lock); }

/* A child forked while another thread holds the lock would wait for it for ever. */
static void survive_forks(void) { pthread_atfork(lock, unlock, unlock); }

static void *map_pages(size_t size)
{
    void *block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    if (size >= (size_t)4 << 20)
        madvise(block, size, MADV_HUGEPAGE);
#endif
    return block;
}

static void unmap_pages(void *block, size_t size) { munmap(block, size); }
