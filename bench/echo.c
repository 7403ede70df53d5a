/* echo: the cheapest server that load can be tried on, to see how much load itself could ask for. MIT licence, see LICENSE.
 *
 *   echo SOCKET ANSWER
 *
 * Sends ANSWER, with \n for a line feed, whenever a request has arrived that ends in an empty line. One thread and epoll; ends by
 * itself after a minute.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define EVENTS 512

static size_t unescape(char *text)
{
    char *to = text;
    for (char *from = text; *from; from++) {
        if (from[0] == '\\' && from[1] == 'n') {
            *to++ = '\n';
            from++;
        } else
            *to++ = *from;
    }
    return (size_t)(to - text);
}

static int watch(int poll, int descriptor)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = descriptor};
    return epoll_ctl(poll, EPOLL_CTL_ADD, descriptor, &event);
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    static char request[65536];
    static struct epoll_event events[EVENTS];
    if (argc != 3 || strlen(argv[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: echo SOCKET ANSWER\n");
        return 64;
    }
    strcpy(address.sun_path, argv[1]);
    size_t length = unescape(argv[2]);
    int poll = epoll_create1(0), listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 1024) != 0 || watch(poll, listener) != 0) {
        perror("echo");
        return 1;
    }
    alarm(60);
    for (;;) {
        int ready = epoll_wait(poll, events, EVENTS, -1);
        for (int index = 0; index < ready; index++) {
            int descriptor = events[index].data.fd;
            if (descriptor == listener) {
                watch(poll, accept4(listener, NULL, NULL, SOCK_CLOEXEC));
                continue;
            }
            ssize_t got = recv(descriptor, request, sizeof request, 0);
            if (got <= 0)
                close(descriptor);
            else if (got > 1 && memcmp(request + got - 2, "\n\n", 2) == 0 && send(descriptor, argv[2], length, MSG_NOSIGNAL) < 0)
                close(descriptor);
        }
    }
}
