/* A C library that knows nothing of Python: trains on the same x in threads of its own, by a function that it is given. */
#include <pthread.h>
#include <cbn.h>

enum { THREADS = 6 };

typedef struct {
    cbn_training_function *train;
    ptrdiff_t outer, channels, inner;
    const float *x;
    float *y;
    double *mean, *var;
    int status;
} Call;

static void *call(void *argument)
{
    Call *c = (Call *)argument;
    c->status = c->train(CBN_FLOAT32, c->outer, c->channels, c->inner, c->x, NULL, c->y, CBN_FLOAT32, NULL, NULL, NULL, NULL, c->mean, c->var,
                         0.1, 1e-5, CBN_RELU, 0, 0, 2);
    return NULL;
}

/* y, mean and var have THREADS results one after another. Returns how many calls failed. */
#ifdef __cplusplus
extern "C"
#endif
int train_in_threads(cbn_training_function *train, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner, const float *x, float *y, double *mean,
                     double *var)
{
    pthread_t threads[THREADS];
    Call calls[THREADS];
    int i, failed = 0;
    for (i = 0; i < THREADS; i++) {
        Call c = {train, outer, channels, inner, x, y + i * outer * channels * inner, mean + i * channels, var + i * channels, 1};
        calls[i] = c;
        if (pthread_create(&threads[i], NULL, call, &calls[i]) != 0)
            return THREADS;
    }
    for (i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        failed += calls[i].status != CBN_OK;
    }
    return failed;
}
