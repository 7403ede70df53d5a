/* load: connections to a Unix socket, each with one request in flight. MIT licence, see LICENSE.
 *
 *   load SOCKET CONNECTIONS SECONDS HOLD < QUESTIONS
 *
 * QUESTIONS: netstrings in pairs, a request and the answer that it must get; any other answer ends the run. The requests are sent in
 *            turn, over whichever connection is free, and start again after the last.
 * SECONDS:   the time that is measured. It begins when each connection has asked once and had its answer. 0: until each request has
 *            been sent once, all of it measured; -1: the same, but it begins when each connection has asked once. What is in flight at
 *            the end is waited for, so that the server has nothing left to do.
 * HOLD:      for this many seconds the connections stay open and silent after the figures have been printed.
 * Prints one line of JSON: answers, seconds, the 50th and 99th percentile and the greatest time of an answer, and the longest time in
 * which no connection got one (gap; here everything from the first request to the last answer counts), all in microseconds, and the
 * processor seconds that load itself used. One thread and epoll, so that it costs far less than what it measures.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 1000000 /* of the histogram, one for each microsecond */
#define MAX_ANSWER 4096
#define MAX_WAIT_MS 10000

struct text {
    char *bytes;
    size_t length;
};

struct question {
    struct text request, answer;
};

struct connection {
    int socket;
    uint64_t sent_at;
    struct question *question; /* in flight */
    size_t received;
    char answer[MAX_ANSWER];
};

static struct question *questions;
static size_t question_count, next_question;
static struct connection *connections;
static int connection_count, epoll;
static struct epoll_event *events;
static uint32_t histogram[SLOTS];
static uint64_t answers, greatest_ns; /* as the histogram, since they were set to 0 */
static uint64_t gap_ns;

static void fail(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "not understood");
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double processor_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

/* The next netstring of standard input; 0 at its end. */
static int read_netstring(struct text *text)
{
    if (scanf("%zu", &text->length) != 1)
        return 0;
    text->bytes = malloc(text->length + 1);
    if (!text->bytes || getchar() != ':' || fread(text->bytes, 1, text->length, stdin) != text->length || getchar() != ',')
        fail("questions");
    return 1;
}

static void read_questions(void)
{
    struct question question;
    size_t room = 0;
    while (read_netstring(&question.request)) {
        if (!read_netstring(&question.answer) || question.answer.length < 1 || question.answer.length > MAX_ANSWER)
            fail("answer");
        if (question_count == room) {
            room = room ? 2 * room : 1024;
            questions = realloc(questions, room * sizeof *questions);
            if (!questions)
                fail("questions");
        }
        questions[question_count++] = question;
    }
    if (question_count == 0)
        fail("questions");
}

static void send_next(struct connection *connection)
{
    struct question *question = connection->question = &questions[next_question];
    next_question = next_question + 1 == question_count ? 0 : next_question + 1;
    connection->received = 0;
    connection->sent_at = now_ns();
    if (send(connection->socket, question->request.bytes, question->request.length, MSG_NOSIGNAL) != (ssize_t)question->request.length)
        fail("send");
}

/* Take what has arrived; 1 when the answer is whole, and as it must be. */
static int receive(struct connection *connection)
{
    ssize_t got = recv(connection->socket, connection->answer + connection->received, MAX_ANSWER - connection->received, MSG_DONTWAIT);
    if (got <= 0) {
        errno = got == 0 ? ECONNRESET : errno;
        fail("receive");
    }
    connection->received += (size_t)got;
    const struct text *wanted = &connection->question->answer;
    size_t compared = connection->received < wanted->length ? connection->received : wanted->length;
    if (connection->received > wanted->length || memcmp(connection->answer, wanted->bytes, compared) != 0) {
        fprintf(stderr, "load: another answer: %.*s\nexpected: %.*s\nto: %.*s\n", (int)connection->received, connection->answer,
                (int)wanted->length, wanted->bytes, (int)connection->question->request.length, connection->question->request.bytes);
        exit(1);
    }
    return connection->received == wanted->length;
}

static void record(uint64_t took_ns)
{
    answers++;
    greatest_ns = took_ns > greatest_ns ? took_ns : greatest_ns;
    histogram[took_ns / 1000 < SLOTS ? took_ns / 1000 : SLOTS - 1]++;
}

/* Ask this many requests, or until the time is over. Then each connection has its answer; answers that came too late do not count. */
static void ask(size_t left, uint64_t end_ns)
{
    size_t in_flight = 0;
    uint64_t last = now_ns();
    for (int index = 0; index < connection_count && left; index++, left--, in_flight++)
        send_next(&connections[index]);
    while (in_flight) {
        int ready = epoll_wait(epoll, events, connection_count, MAX_WAIT_MS);
        if (ready == 0) {
            errno = ETIMEDOUT;
            fail("no answer");
        }
        for (int index = 0; index < ready; index++) {
            struct connection *connection = events[index].data.ptr;
            if (!receive(connection))
                continue;
            in_flight--;
            uint64_t now = now_ns();
            gap_ns = now - last > gap_ns ? now - last : gap_ns;
            last = now;
            if (now >= end_ns)
                continue;
            record(now - connection->sent_at);
            if (left) {
                send_next(connection);
                left--;
                in_flight++;
            }
        }
    }
}

static void connect_all(const struct sockaddr_un *address)
{
    epoll = epoll_create1(0);
    connections = calloc((size_t)connection_count, sizeof *connections);
    events = calloc((size_t)connection_count, sizeof *events);
    if (epoll < 0 || !connections || !events)
        fail("set-up");
    for (int index = 0; index < connection_count; index++) {
        struct connection *connection = &connections[index];
        connection->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
        if (connection->socket < 0 || connect(connection->socket, (const struct sockaddr *)address, sizeof *address) != 0 ||
            epoll_ctl(epoll, EPOLL_CTL_ADD, connection->socket, &event) != 0)
            fail("connect");
    }
}

static double percentile(double share)
{
    uint64_t seen = 0;
    for (size_t slot = 0; slot < SLOTS; slot++) {
        seen += histogram[slot];
        if ((double)seen >= share * (double)answers)
            return (double)slot;
    }
    return SLOTS;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (argc != 5 || strlen(argv[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: load SOCKET CONNECTIONS SECONDS HOLD < QUESTIONS\n");
        return 64;
    }
    strcpy(address.sun_path, argv[1]);
    connection_count = atoi(argv[2]);
    double seconds = atof(argv[3]), hold = atof(argv[4]);
    if (connection_count < 1 || hold < 0) {
        errno = 0;
        fail("arguments");
    }
    read_questions();
    connect_all(&address);
    size_t left = question_count;
    if (seconds != 0) {
        ask((size_t)connection_count, UINT64_MAX);
        left -= left < (size_t)connection_count ? left : (size_t)connection_count;
        memset(histogram, 0, sizeof histogram);
        answers = greatest_ns = 0;
    }
    double processor = processor_seconds();
    uint64_t started = now_ns(), end = started + (uint64_t)(seconds * 1e9);
    if (seconds > 0)
        ask(SIZE_MAX, end);
    else {
        ask(left, UINT64_MAX);
        end = now_ns();
    }
    printf("{\"answers\": %llu, \"seconds\": %.3f, \"p50_us\": %.0f, \"p99_us\": %.0f, \"max_us\": %.0f, \"gap_us\": %.0f, "
           "\"processor_seconds\": %.3f}\n",
           (unsigned long long)answers, (double)(end - started) / 1e9, percentile(0.5), percentile(0.99), (double)greatest_ns / 1000,
           (double)gap_ns / 1000, processor_seconds() - processor);
    fflush(stdout);
    usleep((useconds_t)(hold * 1e6));
    return 0;
}
