package ztunnel

import (
	"cmp"
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// terminationFromEnv reads how long connections may go on after SIGTERM. Istio's TERMINATION_GRACE_PERIOD_SECONDS is the pod's
// grace, of which the last seconds are kept for a clean end.
func terminationFromEnv(getenv func(string) string, errs *[]error) time.Duration {
	for _, name := range []string{"TERMINATION_GRACE_PERIOD", "CONNECTION_TERMINATION_DEADLINE"} {
		if text := getenv(name); text != "" {
			return checked(name, text, duration, errs)
		}
	}
	const name = "TERMINATION_GRACE_PERIOD_SECONDS"
	text := getenv(name)
	if text == "" {
		return 5 * time.Second
	}
	whole := checked(name, text, duration, errs)
	if whole > 10*time.Second {
		return whole - 5*time.Second
	}
	return max(whole-time.Second, time.Second)
}

// dedicatedFromEnv reads PROXY_MODE, and in dedicated mode the one workload that is served; in shared mode it is zero.
func dedicatedFromEnv(getenv func(string) string) (zds.Workload, error) {
	switch mode := getenv("PROXY_MODE"); mode {
	case "", "shared":
		return zds.Workload{}, nil
	case "dedicated":
	default:
		return zds.Workload{}, fmt.Errorf("PROXY_MODE: %q is neither shared nor dedicated", mode)
	}
	parts := strings.Split(getenv("PROXY_WORKLOAD_INFO"), "/")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return zds.Workload{}, errors.New("PROXY_WORKLOAD_INFO: want <namespace>/<name>/<service account> with PROXY_MODE=dedicated")
	}
	return zds.Workload{UID: "dedicated", Namespace: parts[0], Name: parts[1], ServiceAccount: parts[2]}, nil
}

// unsupportedFromEnv refuses what cannot be left out unseen.
func unsupportedFromEnv(getenv func(string) string, errs *[]error) {
	if getenv("CRL_PATH") != "" {
		*errs = append(*errs, errors.New("CRL_PATH: revocation lists are not supported, and revoked certificates must not be taken"))
	}
	if getenv("LOCAL_XDS") != "" && getenv("LOCAL_XDS_PATH") != "" {
		*errs = append(*errs, errors.New("LOCAL_XDS, LOCAL_XDS_PATH: only one may be set"))
	}
}

// tuned reads a number or duration that has its default elsewhere: unset is zero.
func tuned[T int | time.Duration](getenv func(string) string, name string, parse func(string) (T, error), errs *[]error) T {
	if text := getenv(name); text != "" {
		return checked(name, text, parse, errs)
	}
	return 0
}

func checked[T any](name, text string, parse func(string) (T, error), errs *[]error) T {
	value, err := parse(text)
	if err != nil {
		*errs = append(*errs, fmt.Errorf("%s: %w", name, err))
	}
	return value
}

// workers reads a number of threads, or a part of the processors ("50%").
func workers(text string) (int, error) {
	if percent, ok := strings.CutSuffix(text, "%"); ok {
		n, err := strconv.ParseUint(percent, 10, 16)
		return max(1, int(n)*runtime.NumCPU()/100), err
	}
	return positive(text)
}

func positive(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err == nil && n < 1 {
		err = fmt.Errorf("%d is not positive", n)
	}
	return n, err
}

// withScheme adds https:// to an address without a scheme.
func withScheme(address string) string {
	if strings.Contains(address, "://") {
		return address
	}
	return "https://" + address
}

// clusterID is the cluster's name, which Istio's injection writes under another name.
func clusterID(getenv func(string) string) string {
	return cmp.Or(getenv("ISTIO_META_CLUSTER_ID"), getenv("CLUSTER_ID"), "Kubernetes")
}
