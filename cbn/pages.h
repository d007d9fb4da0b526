/* Blocks of pages for large arrays. What is freed is kept a second for the next array, as fresh pages cost more than what fills them; then a thread, which
 * exists only while something is kept, gives it back to the system. */
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32                       /* there NumPy allocates, and nothing is kept */
static void *take_block(size_t bytes, int zeros) { return NULL; }
static void give_block(void *data) {}
static size_t room(void *data) { return 0; }
static void set_most_kept(size_t most, size_t last) {}
static void get_most_kept(size_t *most, size_t *last) { *most = *last = 0; }
static int keeps(void) { return 0; }
static void give_all_back(void) {}
static size_t bytes_kept_now(void) { return 0; }
static void start_pages(void) {}
#else
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

#ifdef __APPLE__
#define CLOCK CLOCK_REALTIME        /* the only one of its condition variables */
#else
#define CLOCK CLOCK_MONOTONIC
#endif

#define SECONDS_KEPT 1
#define PAGE ((size_t)4096)
#define STACK_BYTES (256 << 10)

/* What a block begins with. */
typedef struct block {
    size_t size;                    /* of the mapping */
    char *data;                     /* within the first page, see start_of */
    struct timespec until;          /* when it is given back */
    struct block *next;             /* of the blocks kept, the last freed first */
} block;

static pthread_mutex_t pages_lock = PTHREAD_MUTEX_INITIALIZER;      /* of all these */
static pthread_cond_t watcher_ends;
static block *kept;
static size_t bytes_kept;
static size_t most_kept, most_last;                                 /* bytes: of the block freed last, if it has at most `most_last`, and of others */
static unsigned turn;
static pthread_t watcher;
static int watching;                                                /* there is a watcher, that hasn't been told to end */
static int forks;                                                   /* under way */

static int has_come(const struct timespec *time, const struct timespec *now)
{
    return time->tv_sec < now->tv_sec || (time->tv_sec == now->tv_sec && time->tv_nsec <= now->tv_nsec);
}

/* Take from the list, and return, what is kept too long and what is too much. The lock is held; the pages are unmapped without it. */
static block *take_surplus(size_t most, size_t last)
{
    block *surplus = NULL, **link = &kept, *b;
    struct timespec now;
    clock_gettime(CLOCK, &now);
    while ((b = *link) != NULL) {
        if (has_come(&b->until, &now) || b->size > (b == kept && last > most ? last : most)) {
            *link = b->next;
            bytes_kept -= b->size;
            b->next = surplus;
            surplus = b;
            continue;
        }
        if (b != kept || b->size > last)
            most -= b->size;
        link = &b->next;
    }
    return surplus;
}

static void unmap(block *b)
{
    block *next;
    for (; b != NULL; b = next) {
        next = b->next;
        munmap(b, b->size);
    }
}

static void *watch(void *unused)
{
    block *surplus, *oldest;
    pthread_mutex_lock(&pages_lock);
    while (watching && kept != NULL) {
        for (oldest = kept; oldest->next != NULL;)
            oldest = oldest->next;
        struct timespec until = oldest->until;
        pthread_cond_timedwait(&watcher_ends, &pages_lock, &until);
        surplus = take_surplus(most_kept, most_last);
        pthread_mutex_unlock(&pages_lock);
        unmap(surplus);
        pthread_mutex_lock(&pages_lock);
    }
    if (watching)                   /* else who told it to end waits for that */
        pthread_detach(watcher);
    watching = 0;
    pthread_mutex_unlock(&pages_lock);
    return unused;
}

/* Whether what is kept will be given back in time: there is a watcher, or one can be started. The lock is held. */
static int watched(void)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    if (watching || forks || pthread_attr_init(&attributes))
        return watching;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);        /* signals are for threads of the program */
    watching = pthread_attr_setstacksize(&attributes, STACK_BYTES) == 0 && pthread_create(&watcher, &attributes, watch, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return watching;
}

/* Give all that is kept back to the system. */
static void give_all_back(void)
{
    block *surplus;
    pthread_mutex_lock(&pages_lock);
    surplus = take_surplus(0, 0);
    pthread_mutex_unlock(&pages_lock);
    unmap(surplus);
}

static block *map_pages(size_t size)
{
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return NULL;
#ifdef MADV_HUGEPAGE
    if (size >= (size_t)4 << 20)
        madvise(pages, size, MADV_HUGEPAGE);
#endif
    return pages;
}

static size_t rounded(size_t size, size_t step) { return (size + step - 1) / step * step; }

/* Memory for so many bytes, or NULL. Sizes are one of eight to an octave, so that arrays of nearly one size share blocks.
 *
 * Elements begin in one of four places of a page in turn. Where a stretch of input begins 48 to 80 bytes before the output in its page, processors
 * take its loads to depend on the stores just made, as they compare addresses within pages: up to 1.4 times a call's time within caches. NumPy's own
 * large arrays begin 16 bytes after a page does.
 */
static void *take_block(size_t bytes, int zeros)
{
    size_t size = bytes + PAGE, step = PAGE;
    block **link = &kept, *b = NULL, *surplus = NULL;
    if (bytes > PTRDIFF_MAX / 2)
        return NULL;
    while (step * 16 < size)
        step *= 2;
    size = rounded(size, step);
    pthread_mutex_lock(&pages_lock);
    while (!zeros && *link != NULL && (*link)->size != size)
        link = &(*link)->next;
    if (!zeros && *link != NULL) {
        b = *link;
        *link = b->next;
        bytes_kept -= size;
    } else if (size > most_kept)        /* a large one of another size will take its place */
        surplus = take_surplus(most_kept, 0);
    turn++;
    size_t start = 512 + turn % 4 * 1024;
    pthread_mutex_unlock(&pages_lock);
    unmap(surplus);
    if (b != NULL)
        return b->data;
    b = map_pages(size);
    if (b == NULL) {
        give_all_back();
        size = rounded(bytes + PAGE, PAGE);
        b = map_pages(size);
    }
    if (b == NULL)
        return NULL;
    b->size = size;
    b->data = (char *)b + start;
    return b->data;
}

static block *block_of(void *data) { return (block *)((uintptr_t)data / PAGE * PAGE); }

static size_t room(void *data) { return block_of(data)->size - (uintptr_t)data % PAGE; }

static void give_block(void *data)
{
    block *b = block_of(data), *surplus;
    clock_gettime(CLOCK, &b->until);
    b->until.tv_sec += SECONDS_KEPT;
    pthread_mutex_lock(&pages_lock);
    b->next = kept;
    kept = b;
    bytes_kept += b->size;
    surplus = take_surplus(most_kept, most_last);
    if (kept != NULL && !watched()) {
        unmap(surplus);
        surplus = take_surplus(0, 0);
    }
    pthread_mutex_unlock(&pages_lock);
    unmap(surplus);
}

static void set_most_kept(size_t most, size_t last)
{
    block *surplus;
    pthread_mutex_lock(&pages_lock);
    most_kept = most;
    most_last = last;
    surplus = take_surplus(most, last);
    pthread_mutex_unlock(&pages_lock);
    unmap(surplus);
}

static void get_most_kept(size_t *most, size_t *last)
{
    pthread_mutex_lock(&pages_lock);
    *most = most_kept;
    *last = most_last;
    pthread_mutex_unlock(&pages_lock);
}

/* Whether anything may be. */
static int keeps(void)
{
    size_t most, last;
    get_most_kept(&most, &last);
    return most > 0 || last > 0;
}

static size_t bytes_kept_now(void)
{
    size_t bytes;
    pthread_mutex_lock(&pages_lock);
    bytes = bytes_kept;
    pthread_mutex_unlock(&pages_lock);
    return bytes;
}

/* A forked child has no watcher, and would hold copies of what is kept; a process whose only other thread that is should fork as one of one thread. */
static void before_fork(void)
{
    block *surplus;
    int ends;
    pthread_mutex_lock(&pages_lock);
    forks++;
    surplus = take_surplus(0, 0);
    ends = watching;
    watching = 0;
    pthread_cond_signal(&watcher_ends);
    pthread_mutex_unlock(&pages_lock);
    unmap(surplus);
    if (ends)
        pthread_join(watcher, NULL);
    pthread_mutex_lock(&pages_lock);
}

static void in_parent(void)
{
    forks--;
    pthread_mutex_unlock(&pages_lock);
}

static void start_condition(void)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
#ifndef __APPLE__
    pthread_condattr_setclock(&attributes, CLOCK);
#endif
    pthread_cond_init(&watcher_ends, &attributes);
    pthread_condattr_destroy(&attributes);
}

static void in_child(void)
{
    forks = 0;
    start_condition();
    pthread_mutex_unlock(&pages_lock);
}

static void start_pages(void)
{
    start_condition();
    pthread_atfork(before_fork, in_parent, in_child);
}
#endif
