// Command box is the one program of the cluster's test images: a server that
// says what it saw, clients that say what they got, and the pause container.
// Every line it prints is JSON, for tests to read.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const usage = `box server [-http :8080] [-echo :9090] [-whoami :9091]
    HTTP/1.1 and h2c: answers any request with a JSON Reply; /healthz "ok"; serves gRPC health checks;
    ?status=N answers with that status, ?delay=D waits first, ?size=N pads the reply.
    echo (TCP and UDP): sends back what it receives. whoami: speaks first, one JSON Reply, then closes.
box client URL [-n 1] [-interval 0s] [-timeout 5s] [-concurrency 1] [-method GET] [-H 'Key: value']...
           [-d BODY] [-keepalive] [-h2c] [-ca FILE] [-summary]
    one JSON line a request; exit status 1 when any got no answer.
box tcp HOST:PORT [-n 1] [-interval 0s] [-timeout 5s] [-size 64] [-d TEXT]
    one connection to an echo server, one JSON line a round trip.
box whoami HOST:PORT [-timeout 5s]
    prints what a whoami server says.
box udp HOST:PORT [-d TEXT] [-timeout 5s]      one datagram and its answer
box syn IP:PORT [-from 4242]                   one SYN by a raw socket
box lookup [-server IP:PORT] [-network udp|tcp] [-timeout 20s] NAME...
    addresses of names
box addrs                                      this network namespace's addresses
box sleep [DURATION]                           until a signal, or that long
box pause                                      until a signal, reaping children
`

func main() {
	name, args := filepath.Base(os.Args[0]), os.Args[1:]
	if name == "box" && len(args) > 0 {
		name, args = args[0], args[1:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	commands := map[string]func(context.Context, []string) error{
		"server": server, "client": client, "tcp": tcp, "whoami": whoami, "udp": udp, "syn": syn,
		"lookup": lookup, "addrs": addrs, "sleep": sleep, "pause": pause,
	}
	run, ok := commands[name]
	if !ok {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err := run(ctx, args); err != nil {
		fmt.Fprintln(os.Stderr, "box "+name+":", err)
		os.Exit(1)
	}
}

// printer writes whole lines of JSON from several goroutines.
type printer struct{ mu sync.Mutex }

func (p *printer) print(v any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := json.Marshal(v)
	if err != nil {
		b = fmt.Appendf(nil, `{"error":%q}`, err.Error())
	}
	os.Stdout.Write(append(b, '\n'))
}

func sleep(ctx context.Context, args []string) error {
	if len(args) == 0 {
		<-ctx.Done()
		return nil
	}
	d, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	return nil
}

// pause is what holds a pod's namespaces; with a shared process namespace it is
// also the pod's init, hence the reaping.
func pause(ctx context.Context, _ []string) error {
	children := make(chan os.Signal, 16)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-children:
			for {
				if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}
}
