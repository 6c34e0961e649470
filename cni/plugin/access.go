package plugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/membership"
)

const (
	// questionTime bounds all that is asked of the API server for one pod: one outside the mesh must not wait for long because
	// the server is slow.
	questionTime = 2 * time.Second
	// maxAccess and maxObject bound, in bytes, an Access on disk, and an answer of the API server, which keeps no larger objects.
	maxAccess, maxObject = 1 << 20, 4 << 20
)

// Access is how the plugin asks the API server for pods and namespaces. The agent keeps it on the node's disk, where it outlives
// the agent.
type Access struct {
	// Server is the API server's URL, of https.
	Server string
	// ServerName is the name in its certificate, where that is not the URL's.
	ServerName string `json:",omitempty"`
	// CA are the certificates, in PEM, by which the server's is verified; empty: the system's.
	CA string `json:",omitempty"`
	// Token is a service account's that may get pods and namespaces.
	Token string
}

// readAccess reads an Access. A file that others than this process's user could have written or read is not believed: who
// writes it says who is outside the mesh.
func readAccess(path string) (Access, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Access{}, fmt.Errorf("read the access to the API server: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Access{}, fmt.Errorf("read the access to the API server: %w", err)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 || int(stat.Uid) != os.Geteuid() {
		return Access{}, fmt.Errorf("read the access to the API server: %s is not a file of this user alone: %v", path, info.Mode())
	}
	text, err := readBounded(f, maxAccess)
	if err != nil {
		return Access{}, fmt.Errorf("read the access to the API server: %w", err)
	}
	var access Access
	if err := json.Unmarshal(text, &access); err != nil {
		return Access{}, fmt.Errorf("read the access to the API server: %w", err)
	}
	if server, err := url.Parse(access.Server); err != nil || server.Scheme != "https" || server.Host == "" || access.Token == "" {
		return Access{}, fmt.Errorf("read the access to the API server: %s names no https server and token", path)
	}
	return access, nil
}

func readBounded(r io.Reader, most int64) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(text)) > most {
		err = fmt.Errorf("more than %d bytes", most)
	}
	return text, err
}

// object is what the plugin reads of a pod or a namespace.
type object struct {
	Kind     string
	Metadata struct {
		Name, Namespace, UID string
		Labels, Annotations  map[string]string
	}
	Spec   struct{ HostNetwork bool }
	Status struct{ Phase string }
}

// errNotFound is the API server's word that there is no such object.
var errNotFound = errors.New("not found")

// decide asks the API server whether the sandbox's pod is to be in the mesh. A pod that it does not know, as a static one whose
// copy is still to be made, is in it where its namespace is, and otherwise an error.
func (a Access) decide(event Event, exclude []string) (membership.Decision, error) {
	ctx, cancel := context.WithTimeout(context.Background(), questionTime)
	defer cancel()
	client, err := a.client()
	if err != nil {
		return membership.Decision{}, err
	}
	defer client.CloseIdleConnections()
	pod, missing := a.get(ctx, client, "Pod", event.PodNamespace, event.PodName)
	if missing == nil && !isPod(pod, event.PodUID) {
		missing = fmt.Errorf("pod %s/%s of UID %q: %w", event.PodNamespace, event.PodName, event.PodUID, errNotFound)
	}
	if missing != nil && !errors.Is(missing, errNotFound) {
		return membership.Decision{}, missing
	}
	namespace, err := a.get(ctx, client, "Namespace", "", event.PodNamespace)
	if err != nil && !errors.Is(err, errNotFound) {
		return membership.Decision{}, err
	}
	facts := membership.Pod{Namespace: event.PodNamespace}
	if missing == nil {
		facts.Labels, facts.Annotations, facts.HostNetwork = pod.Metadata.Labels, pod.Metadata.Annotations, pod.Spec.HostNetwork
		facts.Ended = pod.Status.Phase == "Succeeded" || pod.Status.Phase == "Failed"
	}
	decided := membership.Decide(facts, namespace.Metadata.Labels, exclude)
	if missing != nil && !decided.Enrol {
		return decided, missing
	}
	return decided, nil
}

// isPod tells whether a sandbox's UID is the pod's; a static pod's sandbox has the UID of its file.
func isPod(pod object, uid string) bool {
	return uid == "" || slices.Contains([]string{pod.Metadata.UID, pod.Metadata.Annotations[membership.MirrorAnnotation]}, uid)
}

// client speaks to that server alone: no proxy of the environment, no redirection, no other certificate.
func (a Access) client() (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: a.ServerName}
	if a.CA != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(a.CA)) {
			return nil, errors.New("the access to the API server holds no certificate to verify it by")
		}
	}
	return &http.Client{
		Transport:     &http.Transport{TLSClientConfig: config, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// get asks for one object of the core group; namespace is empty for those that are in none.
func (a Access) get(ctx context.Context, client *http.Client, kind, namespace, name string) (object, error) {
	path := []string{"api", "v1", "namespaces", name}
	if namespace != "" {
		path = []string{"api", "v1", "namespaces", namespace, "pods", name}
	}
	for _, element := range path {
		if !plain(element) {
			return object{}, fmt.Errorf("ask the API server for %s %.64q: not a name", kind, element)
		}
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(a.Server, "/")+"/"+strings.Join(path, "/"), nil)
	if err != nil {
		return object{}, fmt.Errorf("ask the API server: %w", err)
	}
	request.Header = http.Header{"Authorization": {"Bearer " + a.Token}, "Accept": {"application/json"}, "User-Agent": {Type}}
	response, err := client.Do(request)
	if err != nil {
		return object{}, fmt.Errorf("ask the API server: %w", err)
	}
	defer response.Body.Close()
	text, err := readBounded(response.Body, maxObject)
	if err != nil {
		return object{}, fmt.Errorf("ask the API server for %s %s: %w", kind, name, err)
	}
	switch response.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return object{}, fmt.Errorf("ask the API server for %s %s: %w", kind, name, errNotFound)
	default:
		return object{}, fmt.Errorf("ask the API server for %s %s: %s", kind, name, response.Status)
	}
	var got object
	if err := json.Unmarshal(text, &got); err != nil {
		return object{}, fmt.Errorf("ask the API server for %s %s: %w", kind, name, err)
	}
	if got.Kind != kind || got.Metadata.Name != name || got.Metadata.Namespace != namespace {
		return object{}, fmt.Errorf("ask the API server for %s %s: it answered with another object", kind, name)
	}
	return got, nil
}

// plain tells whether a name, which comes from the runtime, can be part of a path.
func plain(name string) bool {
	return name != "" && len(name) <= 253 && name[0] != '.' && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-.") == ""
}
