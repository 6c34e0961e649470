package cli

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
)

// adminPort is the node proxy's admin port, on its pod's loopback only: the way to it is a port-forward, for which the
// API server asks for the right to pods/portforward.
const adminPort = 15000

// forwarder reaches ports of pods.
type forwarder struct {
	rest       *rest.Config
	kubernetes kubernetes.Interface
}

// get fetches a path of a pod's admin interface.
func (k *forwarder) get(ctx context.Context, namespace, pod, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	transport, upgrader, err := spdy.RoundTripperFor(k.rest)
	if err != nil {
		return nil, fmt.Errorf("forward a port to %s/%s: %w", namespace, pod, err)
	}
	url := k.kubernetes.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("portforward").URL()
	stop, ready := make(chan struct{}), make(chan struct{})
	defer close(stop)
	var complaint strings.Builder
	forward, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url),
		[]string{fmt.Sprintf("0:%d", adminPort)}, stop, ready, io.Discard, &complaint)
	if err != nil {
		return nil, fmt.Errorf("forward a port to %s/%s: %w", namespace, pod, err)
	}
	failed := make(chan error, 1)
	go func() { failed <- forward.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-failed:
		return nil, fmt.Errorf("forward a port to %s/%s: %w: %s", namespace, pod, err, complaint.String())
	case <-ctx.Done():
		return nil, fmt.Errorf("forward a port to %s/%s: %w", namespace, pod, ctx.Err())
	}
	ports, err := forward.GetPorts()
	if err != nil {
		return nil, fmt.Errorf("forward a port to %s/%s: %w", namespace, pod, err)
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", ports[0].Local, path), nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask %s/%s for %s: %w", namespace, pod, path, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, fmt.Errorf("ask %s/%s for %s: %w", namespace, pod, path, err)
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask %s/%s for %s: %s: %s", namespace, pod, path, response.Status, body)
	}
	return body, nil
}
