/* What cbn asks of OpenMP, what stands for it in a build without, and who may have a team of threads when: a process may fork, call from many
 * threads at once, be refused threads by the system, or share its cores with others.
 */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#define openmp_version() _OPENMP
#ifndef _WIN32
/* OpenMP 5.0; weak, as older runtimes lack it. */
extern int omp_pause_resource_all(omp_pause_resource_t) __attribute__((weak));
#endif
#else
#define openmp_version() 0
#define omp_get_max_threads() 1
#endif

/* OpenMP keeps a team for each thread that has ever called. Of the threads that called within the last second, this many keep one. */
#define TEAMS 8
#define SECONDS_KEPT 1.0

/* How long no larger team is asked for after the system has refused one. */
#define SECONDS_REFUSED 1.0

/* The most that a single call counts for. */
#define SECONDS_STALL 0.010

/* Threads without work for so long are asleep. When they wake, the system may put them on one core, and takes a few time slices to part them: waiting
 * in that time says nothing about other processes. */
#define SECONDS_ASLEEP 0.005
#define SECONDS_WAKING 0.010

/* How long a process does without teams whose time is spent waiting for cores that others use: the least; and, doubled each time that it is so
 * again within SECONDS_SUSPECT after that, the most. */
#define SECONDS_SERIAL 0.5
#define SECONDS_SERIAL_MOST 4.0
#define SECONDS_SUSPECT 1.0

/* Calls share the threads among as many as have been at work at once in this period or the last one. */
#define SECONDS_CROWD 0.010

static struct {
    void *owner;                    /* the address of `team` in the thread that has it, or NULL */
    double used;
} teams[TEAMS];

static __thread int team;           /* threads of this thread's team, itself included */
static int computing;               /* threads at work in calls */
static int calls;                   /* calls at work, but for those too small for a team */
static int crowd, last_crowd;       /* the most of them at once, in this period and the last one */
static double crowd_until;          /* the period's end */
static double refused_until;
static double serial_until;
static double serial_for = SECONDS_SERIAL;          /* how long, the last time */
static double patience = 0.040;     /* seconds of waiting before the process does without teams: several stalls, close upon one another */
static double waited;
static double last_end, awake_since;                /* of calls with a team */
static pthread_mutex_t teams_lock = PTHREAD_MUTEX_INITIALIZER;      /* of all these but `computing` */
static pthread_key_t thread_end;

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void *until_unlocked(void *lock)
{
    pthread_mutex_lock(lock);
    pthread_mutex_unlock(lock);
    return NULL;
}

/* Whether the system lets this process have n more threads: it starts and ends them. OpenMP ends the process where it doesn't. */
static int system_grants(int n)
{
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_t *threads = malloc(n * sizeof(pthread_t));
    int i, started = 0;
    if (threads == NULL)
        return 0;
    pthread_mutex_lock(&lock);
    while (started < n && pthread_create(&threads[started], NULL, until_unlocked, &lock) == 0)
        started++;
    pthread_mutex_unlock(&lock);
    for (i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    free(threads);
    return started == n;
}

static void leave_team(void *owner)
{
    int i;
    pthread_mutex_lock(&teams_lock);
    for (i = 0; i < TEAMS; i++)
        if (teams[i].owner == owner)
            teams[i].owner = NULL;
    pthread_mutex_unlock(&teams_lock);
}

/* Whether the calling thread may have a team of n now. */
static int may_have_team(int n, double now)
{
    int i, mine = -1, granted = 0;
    pthread_mutex_lock(&teams_lock);
    for (i = 0; i < TEAMS; i++)
        if (teams[i].owner == &team || (mine < 0 && (teams[i].owner == NULL || now - teams[i].used > SECONDS_KEPT)))
            mine = i;
    if (mine >= 0 && now >= serial_until && (n <= team || now >= refused_until)) {
        if (teams[mine].owner != &team)
            pthread_setspecific(thread_end, &team);
        teams[mine].owner = &team;
        teams[mine].used = now;
        granted = 1;
    }
    pthread_mutex_unlock(&teams_lock);
    /* Twice as many, as those that have just ended may count for a moment longer. */
    if (granted && n > team && !system_grants(2 * (n - 1))) {
        pthread_mutex_lock(&teams_lock);
        refused_until = now + SECONDS_REFUSED;
        pthread_mutex_unlock(&teams_lock);
        granted = 0;
    }
    if (granted)
        team = n;       /* also where it was larger: OpenMP ends the others */
    return granted;
}

/* The share of `budget` threads that a call which now begins may have. */
static int share_among_calls(int budget, double now)
{
    int together;
    pthread_mutex_lock(&teams_lock);
    calls++;
    if (now >= crowd_until) {
        last_crowd = now < crowd_until + SECONDS_CROWD ? crowd : 1;
        crowd = 0;
        crowd_until = now + SECONDS_CROWD;
    }
    if (crowd < calls)
        crowd = calls;
    together = crowd > last_crowd ? crowd : last_crowd;
    pthread_mutex_unlock(&teams_lock);
    return budget > together ? budget / together : 1;
}

/* The threads for a call that is worth n of them: all or, where calls would be using more than `budget` together, one; fewer where calls meet. */
static int borrow_threads(int n, int budget)
{
    double now = seconds();
    int share = share_among_calls(budget, now), together;
    n = n < share ? n : share;
    together = __atomic_add_fetch(&computing, n, __ATOMIC_RELAXED);
    if (n > 1 && (together > budget || !may_have_team(n, now))) {
        __atomic_sub_fetch(&computing, n - 1, __ATOMIC_RELAXED);
        return 1;
    }
    return n;
}

/* After a call that took so many seconds, and would have taken one thread about `alone` seconds.
 *
 * Where other processes use the cores too, threads wait for each other while they don't run: for whole time slices of the system.
 */
static void return_threads(int n, double start, double alone)
{
    double now, elapsed;
    int suspect;
    __atomic_sub_fetch(&computing, n, __ATOMIC_RELAXED);
    pthread_mutex_lock(&teams_lock);
    calls--;
    if (n == 1 || start < serial_until) {       /* calls that had begun when that was decided tell nothing new */
        pthread_mutex_unlock(&teams_lock);
        return;
    }
    now = seconds();
    elapsed = now - start;
    if (start > last_end + SECONDS_ASLEEP)
        awake_since = start;
    last_end = now;
    if (elapsed <= 2 * alone)
        waited = waited > elapsed ? waited - elapsed : 0;
    else if (start > awake_since + SECONDS_WAKING)
        waited += elapsed < SECONDS_STALL ? elapsed : SECONDS_STALL;        /* one stall, however long, is an accident */
    suspect = now < serial_until + SECONDS_SUSPECT;
    if (waited > (suspect ? patience / 4 : patience)) {
        waited = 0;
        serial_for = !suspect ? SECONDS_SERIAL : 2 * serial_for < SECONDS_SERIAL_MOST ? 2 * serial_for : SECONDS_SERIAL_MOST;
        serial_until = now + serial_for;
    }
    pthread_mutex_unlock(&teams_lock);
}

/* Set in a forked child whose OpenMP runtime believes in threads that the fork left behind: the next region would wait for them for ever. */
static int forked_without_threads = 0;

#ifdef _WIN32                       /* where no process forks */
static void handle_forks(void) {}
#else
static void before_fork(void)
{
#ifdef _OPENMP
    /* Ends the forking thread's team; the next region, in parent and child, makes a new one. */
    if (omp_pause_resource_all)
        omp_pause_resource_all(omp_pause_soft);
#endif
    team = 0;
    pthread_mutex_lock(&teams_lock);
}

static void in_parent(void) { pthread_mutex_unlock(&teams_lock); }

static void in_child(void)
{
    int i;
#ifdef _OPENMP
    if (!omp_pause_resource_all)
        forked_without_threads = 1;
#endif
    for (i = 0; i < TEAMS; i++)
        teams[i].owner = NULL;
    computing = calls = crowd = last_crowd = 0;
    refused_until = serial_until = crowd_until = waited = last_end = awake_since = 0;
    pthread_mutex_unlock(&teams_lock);
}

static void handle_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }
#endif

static void start_parallel(void)
{
    pthread_key_create(&thread_end, leave_team);
    handle_forks();
}
