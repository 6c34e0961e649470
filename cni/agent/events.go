package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// lookupTimeout bounds the search for the pod that a sandbox is for.
const lookupTimeout = 5 * time.Second

// events answers the CNI plugin.
type events struct {
	log   *zap.Logger
	watch *watcher
	enrol *enroller
	// ready tells what the agent still waits for, or nil.
	ready func() error
}

// refusal is an error with the HTTP status to answer it with.
type refusal struct {
	status int
	error
}

func (e *events) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+plugin.AddPath, e.handle(e.add))
	mux.HandleFunc("POST "+plugin.DelPath, e.handle(e.del))
	mux.HandleFunc("POST "+plugin.CheckPath, e.handle(e.check))
	mux.HandleFunc("GET "+plugin.StatusPath, func(w http.ResponseWriter, _ *http.Request) {
		if err := e.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	return mux
}

// handle wraps what is the same for all events: reading, checking, answering.
func (e *events) handle(act func(context.Context, plugin.Event) (plugin.Answer, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		event, err := readEvent(http.MaxBytesReader(w, r.Body, plugin.MaxEvent))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer, err := act(r.Context(), event)
		if err != nil {
			status := http.StatusServiceUnavailable
			var refused refusal
			if errors.As(err, &refused) {
				status = refused.status
			}
			e.log.Warn("sandbox refused", zap.String("path", r.URL.Path), zap.String("pod", event.PodNamespace+"/"+event.PodName),
				zap.String("container", event.ContainerID), zap.Error(err))
			http.Error(w, err.Error(), status)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			e.log.Warn("answer not sent to the plugin", zap.Error(err))
		}
	}
}

// add captures the sandbox's pod if it is to be in the mesh, and answers when it is captured.
func (e *events) add(ctx context.Context, event plugin.Event) (plugin.Answer, error) {
	if err := e.ready(); err != nil {
		return plugin.Answer{}, fmt.Errorf("the node's cni-agent is starting: %w", err)
	}
	lookup, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	pod, err := e.watch.podOf(lookup, event.PodNamespace, event.PodName, event.PodUID)
	if err != nil {
		return plugin.Answer{}, err
	}
	namespace, err := e.watch.namespaceOf(lookup, pod)
	if err != nil {
		return plugin.Answer{}, err
	}
	decided := decide(pod, namespace, e.watch.exclude)
	rec, ns, err := e.sandbox(recordOf(pod), event)
	if ns != nil {
		defer ns.Close()
	}
	if !decided.Enrol {
		// Whatever is odd about it, the pod is none of the mesh's business.
		if err = errors.Join(err, e.enrol.remember(rec)); err != nil {
			e.log.Info("sandbox outside the mesh not recorded", zap.String("pod", rec.pod()), zap.Error(err))
		}
		return plugin.Answer{Reason: decided.Why}, nil
	}
	if err != nil {
		return plugin.Answer{}, refusal{http.StatusBadRequest, err}
	}
	// What cannot be understood is told of when the watch looks at the pod.
	rec.Exclude, _ = e.watch.exclusions(pod, namespace)
	if err := e.enrol.start(ctx, rec, ns); err != nil {
		// Of the mesh in any case: nobody else need be asked.
		return plugin.Answer{}, refusal{http.StatusInternalServerError, err}
	}
	e.watch.queue.Add(work{key: rec.pod()}) // for the annotation
	return plugin.Answer{Redirected: true, Reason: decided.Why}, nil
}

// sandbox completes a pod's record by what the plugin says of the sandbox, and opens its network namespace, which the
// caller closes.
func (e *events) sandbox(rec record, event plugin.Event) (record, *os.File, error) {
	rec.ContainerID, rec.Netns = event.ContainerID, event.Netns
	ips, err := addresses(event.IPs)
	if err != nil {
		return rec, nil, err
	}
	rec.IPs = ips
	ns, err := netns.Open(event.Netns)
	if err != nil {
		return rec, nil, err
	}
	rec.Cookie, err = netns.Cookie(ns)
	return rec, ns, err
}

// del forgets the sandbox.
func (e *events) del(ctx context.Context, event plugin.Event) (plugin.Answer, error) {
	for _, rec := range e.enrol.records.all() {
		if rec.ContainerID == event.ContainerID && rec.ContainerID != "" {
			return plugin.Answer{}, e.enrol.forget(ctx, rec.UID, event.ContainerID)
		}
	}
	return plugin.Answer{}, nil
}

// check tells whether the sandbox's pod is in the mesh if it is to be.
func (e *events) check(ctx context.Context, event plugin.Event) (plugin.Answer, error) {
	lookup, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	pod, err := e.watch.podOf(lookup, event.PodNamespace, event.PodName, event.PodUID)
	if err != nil {
		return plugin.Answer{}, err
	}
	namespace, err := e.watch.namespaceOf(lookup, pod)
	if err != nil {
		return plugin.Answer{}, err
	}
	decided := decide(pod, namespace, e.watch.exclude)
	if !decided.Enrol {
		return plugin.Answer{Reason: decided.Why}, nil
	}
	if rec, ok := e.enrol.records.get(string(pod.UID)); !ok || !e.enrol.holds(rec) {
		return plugin.Answer{}, errors.New("the pod is to be in the mesh and is not captured")
	}
	return plugin.Answer{Redirected: true, Reason: decided.Why}, nil
}

// Names as Kubernetes and container runtimes have them. They come into log lines, file names and the proxy's metrics.
var (
	validName      = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)
	validContainer = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,255}$`)
)

// readEvent reads an event and refuses one with fields that cannot be right.
func readEvent(body io.Reader) (plugin.Event, error) {
	var event plugin.Event
	if err := json.NewDecoder(body).Decode(&event); err != nil {
		return event, fmt.Errorf("decode event: %w", err)
	}
	for _, field := range []struct {
		name, value string
		valid       *regexp.Regexp
		optional    bool
	}{
		{"PodName", event.PodName, validName, false},
		{"PodNamespace", event.PodNamespace, validName, false},
		{"PodUID", event.PodUID, validUID, true},
		{"ContainerID", event.ContainerID, validContainer, true},
	} {
		if field.optional && field.value == "" {
			continue
		}
		if !field.valid.MatchString(field.value) {
			return event, fmt.Errorf("decode event: %s %.64q is not one", field.name, field.value)
		}
	}
	if event.Netns != "" && (!filepath.IsAbs(event.Netns) || filepath.Clean(event.Netns) != event.Netns) {
		return event, fmt.Errorf("decode event: Netns %.64q is not a plain absolute path", event.Netns)
	}
	return event, nil
}

// addresses reads the pod's addresses.
func addresses(configs []plugin.IPConfig) ([]netip.Addr, error) {
	var ips []netip.Addr
	for _, c := range configs {
		prefix, err := netip.ParsePrefix(c.Address)
		if err != nil {
			return nil, fmt.Errorf("read the sandbox's addresses: %w", err)
		}
		ip := prefix.Addr().Unmap()
		if !ip.IsGlobalUnicast() {
			return nil, fmt.Errorf("read the sandbox's addresses: %s is not a pod's", ip)
		}
		ips = append(ips, ip)
	}
	if len(ips) == 0 || len(ips) > bpf.MaxPodIPs {
		return nil, fmt.Errorf("read the sandbox's addresses: %d of them, want 1 to %d", len(ips), bpf.MaxPodIPs)
	}
	return ips, nil
}
