package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// Reply is what the server saw of a request or connection, and who it is.
type Reply struct {
	Pod       string            `json:"pod"`               // $POD_NAME, else the host name
	Namespace string            `json:"namespace"`         // $POD_NAMESPACE
	Node      string            `json:"node"`              // $NODE_NAME
	Version   string            `json:"version,omitempty"` // $VERSION
	Remote    string            `json:"remote"`            // the peer's address as the server sees it
	Local     string            `json:"local"`
	Method    string            `json:"method,omitempty"`
	Host      string            `json:"host,omitempty"`
	Path      string            `json:"path,omitempty"`
	Proto     string            `json:"proto,omitempty"`
	Headers   map[string]string `json:"headers,omitempty"` // several values joined by ", "
	Body      string            `json:"body,omitempty"`    // the first KiB
	BodyBytes int64             `json:"bodyBytes,omitempty"`
	Padding   string            `json:"padding,omitempty"`
}

func self() Reply {
	pod := os.Getenv("POD_NAME")
	if pod == "" {
		pod, _ = os.Hostname()
	}
	return Reply{Pod: pod, Namespace: os.Getenv("POD_NAMESPACE"), Node: os.Getenv("NODE_NAME"), Version: os.Getenv("VERSION")}
}

func server(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("server", flag.ExitOnError)
	httpAddr, echoAddr, whoAddr := fs.String("http", ":8080", ""), fs.String("echo", ":9090", ""), fs.String("whoami", ":9091", "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	out := &printer{}
	failed := make(chan error, 4)
	for addr, handle := range map[string]func(net.Conn){*echoAddr: echo, *whoAddr: sayWho} {
		if addr == "" {
			continue
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		go func() { failed <- accept(l, out, handle) }()
	}
	if *echoAddr != "" {
		pc, err := net.ListenPacket("udp", *echoAddr)
		if err != nil {
			return err
		}
		go func() { failed <- echoPackets(pc, out) }()
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{Addr: *httpAddr, Handler: http.HandlerFunc(serveHTTP(out)), Protocols: &protocols, ReadHeaderTimeout: time.Minute}
	go func() { failed <- srv.ListenAndServe() }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := srv.Shutdown(grace); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		return nil
	}
}

func serveHTTP(out *printer) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" {
			out.print(map[string]string{"probe": r.RemoteAddr, "userAgent": r.UserAgent()})
			fmt.Fprintln(w, "ok")
			return
		}
		if r.URL.Path == "/grpc.health.v1.Health/Check" {
			out.print(map[string]string{"probe": r.RemoteAddr, "userAgent": r.UserAgent()})
			sayServing(w)
			return
		}
		reply := self()
		reply.Remote, reply.Method, reply.Host, reply.Path, reply.Proto = r.RemoteAddr, r.Method, r.Host, r.URL.RequestURI(), r.Proto
		if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
			reply.Local = local.String()
		}
		reply.Headers = map[string]string{}
		for k, v := range r.Header {
			reply.Headers[k] = strings.Join(v, ", ")
		}
		head, err := io.ReadAll(io.LimitReader(r.Body, 1024))
		rest, _ := io.Copy(io.Discard, r.Body)
		reply.Body, reply.BodyBytes = string(head), int64(len(head))+rest
		q := r.URL.Query()
		if d, derr := time.ParseDuration(q.Get("delay")); derr == nil {
			select {
			case <-time.After(d):
			case <-r.Context().Done():
			}
		}
		if n, serr := strconv.Atoi(q.Get("size")); serr == nil && n > 0 && n <= 64<<20 {
			reply.Padding = strings.Repeat("x", n)
		}
		w.Header().Set("Content-Type", "application/json")
		if s, serr := strconv.Atoi(q.Get("status")); serr == nil && s >= 200 && s <= 599 {
			w.WriteHeader(s)
		}
		(&lineWriter{w}).print(reply)
		reply.Padding = ""
		out.print(map[string]any{"request": reply, "readError": text(err)})
	}
}

// sayServing answers a gRPC health check (grpc/doc/health-checking.md) of whatever service, without gRPC's libraries: a
// message without compression, two bytes long, whose field 1 is 1.
func sayServing(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status")
	_, _ = w.Write([]byte{0, 0, 0, 0, 2, 1 << 3, 1}) // a caller that has gone asks again
	w.Header().Set("Grpc-Status", "0")
}

func accept(l net.Listener, out *printer, handle func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			start := time.Now()
			handle(c)
			out.print(map[string]any{"tcp": c.LocalAddr().String(), "remote": c.RemoteAddr().String(), "ms": milliseconds(time.Since(start))})
		}()
	}
}

// echo ends with the client's end or reset; neither is news to anyone.
func echo(c net.Conn) { _, _ = io.Copy(c, c) }

func echoPackets(pc net.PacketConn, out *printer) error {
	b := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			return err
		}
		out.print(map[string]any{"udp": pc.LocalAddr().String(), "remote": from.String(), "bytes": n})
		// What cannot be sent back is lost, as datagrams may be.
		_, _ = pc.WriteTo(b[:n], from)
	}
}

func sayWho(c net.Conn) {
	r := self()
	r.Remote, r.Local = c.RemoteAddr().String(), c.LocalAddr().String()
	(&lineWriter{c}).print(r)
}
